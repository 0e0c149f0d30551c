"""Everything that crosses processes; no other file names a collective."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from rlhf.config.common import check_device_count, cpu_is_asked_for
from rlhf.functional.gae import wide

Answer = TypeVar("Answer")
Item = TypeVar("Item")


def join_processes(timeout: int = 1800) -> PartialState:
    """Make the launched processes know of one another, by gloo on CPUs; one waits `timeout` seconds for another.

    For scripts without training arguments, which do it themselves: a bare PartialState() on CPUs would leave every
    process alone, and on GPUs would wait NCCL's 10 minutes only. A UserError where they would have to share a device.
    """
    cpu = not torch.accelerator.is_available() or cpu_is_asked_for()
    check_device_count(cpu)
    return PartialState(cpu=cpu, timeout=timedelta(seconds=timeout))


def all_sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """float [K] -> float [K], summed over ranks, in double precision where the device has it: one collective."""
    return accelerator.reduce(wide(values), reduction="sum")


def gather_batch(accelerator: Accelerator, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """rows [N, ...] of each rank -> [ranks * N, ...]; values [K] of each rank -> [R, K], one row per rank.

    R < ranks in the last batch of a dataloader if it ends early: Accelerate then keeps `remainder` rows.
    """
    return accelerator.gather(rows), accelerator.gather_for_metrics(values.unsqueeze(0))


def sum_and_max(accelerator: Accelerator, counts: list[int], rounds: list[int]) -> tuple[list[int], list[int]]:
    """counts, 0 where another rank knows, summed over ranks; of each of rounds the largest of any rank.

    One collective for both, none for a single process.
    """
    world = accelerator.num_processes
    if world == 1:
        return counts, rounds
    own = [0] * (len(rounds) * world)
    own[accelerator.process_index :: world] = rounds
    found = accelerator.reduce(torch.tensor(counts + own, device=accelerator.device), reduction="sum").tolist()
    everyone = found[len(counts) :]
    return found[: len(counts)], [max(everyone[i : i + world]) for i in range(0, len(everyone), world)]


def gradient_norm(model: torch.nn.Module) -> float:
    """The norm of all gradients together; of a model that FSDP has spread, of all its parts: a collective then."""
    return float(full_tensor(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 has sharded, gathered: a collective then. Any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether FSDP2 has sharded the module's weights, gathered at the moment or not."""
    return isinstance(module, FSDPModule)


def full_state_dict(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """A model's state_dict on the CPU, where FSDP2 has sharded the model: gathered one tensor after another.

    All ranks call it; those with keep get the dictionary, the others an empty one.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        tensor = full_tensor(tensor)
        if keep:
            weights[name] = tensor.cpu()
    return weights


@contextmanager
def unsharded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Weights that FSDP2 has sharded are plain tensors inside the block, on every rank: each is gathered once.

    modules: roots, as Accelerate has prepared them. Inside, FSDP2 does not see their forward passes, so that each rank
    makes as many as it likes, of any part. No gradients inside. state_dict() would shard them again. Nests.
    """
    parts = [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]
    parts = [part for part in parts if any(isinstance(p, DTensor) for p in part.parameters())]
    hooks = [(table, dict(table)) for part in parts for table in (part._forward_pre_hooks, part._forward_hooks)]
    for part in parts:
        part.unshard()
    try:
        for table, _ in hooks:
            for key, hook in list(table.items()):
                if (hook.__module__ or "").startswith("torch.distributed."):
                    del table[key]
        yield
    finally:
        for table, before in hooks:
            later = dict(table)
            table.clear()
            table.update(before | later)
        for part in parts:
            part.reshard()


def precision_policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """FSDP2 gathers weights in this precision and adds gradients up in float32; what a model returns stays as it is.

    Accelerate's own policy would round log-probs and values to it.
    """
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def local_part(value: Any) -> Any:
    """This rank's part of a tensor that FSDP2 has sharded; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def as_part(local: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded as `like` is, of which this rank's part is `local`; where `like` is not sharded, `local`."""
    if not isinstance(like, DTensor):
        return local
    local = local.to(like.to_local().device)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank: one collective, none for a single process."""
    state = PartialState()
    if state.num_processes == 1:
        return flag
    return bool(reduce(torch.tensor(float(flag), device=state.device), reduction="sum") > 0)


def all_rows(rows: Sequence[Any]) -> list[Any]:
    """The ranks' lists joined in rank order, on every rank; the elements are picklable."""
    return gather_object(list(rows))


@dataclass(frozen=True)
class Shard:
    """The items of a global batch that one rank works on: rank, rank + world, rank + 2 world, …

    Every rank has equally many rows, since under a sharded engine each forward pass is a collective. Where items run
    out, a rank gets padding rows: they hold the batch's first item, their position is -1, and `is_valid` is False.

        shard = Shard.of_rank(len(batch), accelerator)
        mine = shard.of(batch)                    # this rank's items, [B] with padding rows at the end
        shard.rows                                # list of B positions in the global batch, -1 for padding rows
        shard.is_valid                            # bool [B]
        mine[: shard.n_valid]                     # without padding rows
        shard.gather(results[: shard.n_valid])    # every rank's results in the batch's order, on every rank
    """

    n_items: int
    rank: int
    world: int

    @classmethod
    def of_rank(cls, n_items: int, state: PartialState | Accelerator) -> Self:
        """The shard of the calling process."""
        return cls(n_items, state.process_index, state.num_processes)

    @property
    def rows(self) -> list[int]:
        """Positions in the global batch, equally many on every rank; -1 for padding rows."""
        per_rank = -(-self.n_items // self.world)
        positions = (self.rank + row * self.world for row in range(per_rank))
        return [position if position < self.n_items else -1 for position in positions]

    @property
    def n_valid(self) -> int:
        """Rows that are not padding; they come first."""
        return len(range(self.rank, self.n_items, self.world))

    @property
    def is_valid(self) -> Tensor:
        """Bool [B], False for padding rows."""
        return torch.tensor(self.rows, dtype=torch.long) >= 0

    def of(self, items: Sequence[Item]) -> list[Item]:
        """This rank's part of the global batch, padded to the same length on every rank."""
        if len(items) != self.n_items:
            raise ValueError(f"a shard of {self.n_items} items was asked to divide {len(items)}")
        return [items[max(position, 0)] for position in self.rows]

    def gather(self, results: Sequence[Item]) -> list[Item]:
        """One picklable result per valid row of each rank, joined in the order of the global batch: a collective."""
        if len(results) != self.n_valid:
            raise ValueError(f"a shard with {self.n_valid} valid rows was given {len(results)} results")
        by_rank = iter(all_rows(results))
        order = [position for rank in range(self.world) for position in range(rank, self.n_items, self.world)]
        return [result for _, result in sorted(zip(order, by_rank, strict=True), key=lambda pair: pair[0])]


def equal_share(items: Sequence[Item], state: PartialState | Accelerator) -> tuple[list[Item], Tensor]:
    """`Shard.of` and `Shard.is_valid` in one call."""
    shard = Shard.of_rank(len(items), state)
    return shard.of(items), shard.is_valid


def from_main(ask: Callable[[], Answer]) -> Answer:
    """What rank 0 answers, on every rank: one collective. Where it fails all end, and rank 0 alone says why."""
    state, answer, failed = PartialState(), [], None
    if state.is_main_process:
        try:
            answer = [ask(), False]
        except Exception as error:
            answer, failed = [None, True], error
    answer = broadcast_object_list(answer or [None, False])
    if failed is not None:
        raise failed
    if answer[1]:
        raise SystemExit(2)
    return answer[0]


def on_all(do: Callable[[], Answer]) -> Answer:
    """Every rank does it: one collective. Where any fails all end, and the first of those alone says why."""
    failed = None
    try:
        answer = do()
    except Exception as error:
        failed = error
    _end_if_any(failed)
    return answer


def _end_if_any(failed: Exception | None) -> None:
    """One collective. Where any rank has failed all end, and the first of those alone says why."""
    broken = all_rows([failed is not None])
    if not any(broken):
        return
    if failed is not None and broken.index(True) == PartialState().process_index:
        raise failed
    raise SystemExit(2)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Rank 0 runs the block, then the first rank of each other machine, then all others.

    What rank 0 fetches, the others find in a cache that the machines share, and in one of its own a machine fetches
    it once. Where the block fails on any rank all end, and the first of those alone says why. No collective in it.
    """
    state, failed = PartialState(), None
    turn = 0 if state.is_main_process else 1 if state.is_local_main_process else 2
    for _ in range(turn):
        _end_if_any(None)
    try:
        yield
    except Exception as error:
        failed = error
    for _ in range(turn, 3):
        _end_if_any(failed)


def wait_for_everyone() -> None:
    """A barrier over all processes."""
    PartialState().wait_for_everyone()


def exit_together() -> None:
    """End one of several processes once all of them are done, without tearing down what they shared.

    The interpreter's own end sometimes aborts under DeepSpeed with gloo (SIGABRT), and the launcher would call a
    stage failed that has written everything.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and PartialState().num_processes > 1:
        wait_for_everyone()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
