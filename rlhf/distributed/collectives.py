"""All communication between processes. No other file names a collective."""

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

from rlhf.distributed.devices import check_processes, cpu_is_asked_for
from rlhf.functional.gae import widest

Answer = TypeVar("Answer")
Item = TypeVar("Item")


def join_processes(timeout: int = 1800, use_cpu: bool = False, backend: str | None = None) -> PartialState:
    """Connect the launched processes (gloo on CPUs); a process waits `timeout` seconds for the others.

    For scripts without training arguments, and before there are any: these do this themselves. A bare PartialState()
    would connect no processes on CPUs, and would wait only NCCL's 10 minutes on GPUs. A UserError if processes would
    have to share a device.
    """
    cpu = use_cpu or not torch.accelerator.is_available() or cpu_is_asked_for()
    check_processes(cpu)
    return PartialState(cpu=cpu, timeout=timedelta(seconds=timeout), backend=backend)


def all_sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """float [K] -> float [K], summed over ranks, in double precision where the device has it: one collective."""
    return accelerator.reduce(values.to(widest(values.device)), reduction="sum")


def gather_batch(accelerator: Accelerator, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """rows [N, ...] of each rank -> [ranks * N, ...]; values [K] of each rank -> [R, K], one row per rank.

    R < ranks in the last batch of a dataloader if it ends early: Accelerate then keeps `remainder` rows.
    """
    return accelerator.gather(rows), accelerator.gather_for_metrics(values.unsqueeze(0))


def sum_and_max(accelerator: Accelerator, counts: list[int], rounds: list[int]) -> tuple[list[int], list[int]]:
    """Sums of `counts` and maxima of `rounds` over ranks; one collective for both, none for a single process.

    counts: 0 for those that another rank has. rounds: any integers.
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
    """The norm of all gradients; a collective if FSDP2 has sharded the model."""
    return float(full_tensor(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 has sharded, gathered by a collective; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether FSDP2 has sharded the module's weights, even if they are gathered at the moment."""
    return isinstance(module, FSDPModule)


def full_state_dict(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state_dict, on the CPU, of a model that FSDP2 has sharded; gathered one tensor at a time.

    All ranks call it. Ranks with keep=True get the dictionary, the others an empty one.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        tensor = full_tensor(tensor)
        if keep:
            weights[name] = tensor.cpu()
    return weights


@contextmanager
def unsharded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, weights that FSDP2 has sharded are plain tensors on every rank; each is gathered once.

    modules: roots, as Accelerate prepared them. FSDP2 does not see forward passes inside the block, so each rank may
    run any number of them, through any part. No gradients inside; state_dict() would shard the weights again. Nests.
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
    """FSDP2 gathers weights in this precision and sums gradients in float32. Outputs are not cast.

    Accelerate's own policy would round log-probs and values to the low precision.
    """
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def local_part(value: Any) -> Any:
    """This rank's part of a tensor that FSDP2 has sharded; any other value unchanged."""
    return value.to_local() if isinstance(value, DTensor) else value


def as_part(local: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded like `like` whose part on this rank is `local`; `local` itself if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return local
    local = local.to(like.to_local().device)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; one collective, none for a single process."""
    state = PartialState()
    if state.num_processes == 1:
        return flag
    return bool(reduce(torch.tensor(float(flag), device=state.device), reduction="sum") > 0)


def all_rows(rows: Sequence[Any]) -> list[Any]:
    """The ranks' lists joined in rank order, on every rank; elements must be picklable."""
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


def from_main(ask: Callable[[], Answer]) -> Answer:
    """Run `ask` on rank 0 and return its result on every rank; one collective.

    If it raises, rank 0 raises that error and the other ranks exit with code 2.
    """
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
    """Run `do` on every rank, then check that none failed; one collective.

    If some fail, the first of them raises its error and all other ranks exit with code 2.
    """
    failed = None
    try:
        answer = do()
    except Exception as error:
        failed = error
    _end_if_any(failed)
    return answer


def _end_if_any(failed: Exception | None) -> None:
    """One collective. If ranks have failed, the first of them raises its error and all others exit with code 2."""
    broken = all_rows([failed is not None])
    if not any(broken):
        return
    if failed is not None and broken.index(True) == PartialState().process_index:
        raise failed
    raise SystemExit(2)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Rank 0 runs the block first, then the first rank of each other machine, then all others.

    So a download happens once: per machine, or once in all if the machines share a cache. If the block fails on any
    rank, all end as in `on_all`. No collectives inside the block.
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
    """With several processes: wait for all, then exit without tearing down the process group.

    Under DeepSpeed with gloo the interpreter sometimes aborts at its end (SIGABRT), and the launcher would report a
    stage as failed that has written everything.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and PartialState().num_processes > 1:
        wait_for_everyone()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
