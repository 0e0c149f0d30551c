"""Everything that crosses processes; no other file names a collective."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor
from torch.distributed.tensor import DTensor

Answer = TypeVar("Answer")


def join_processes() -> PartialState:
    """Make the launched processes know of one another, by gloo where there is no accelerator.

    For scripts without training arguments, which do it themselves: a bare PartialState() on CPUs would leave every
    process alone.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def all_sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """float [K] -> float [K], summed over ranks, in double precision: one collective."""
    return accelerator.reduce(values.double(), reduction="sum")


def all_max(accelerator: Accelerator, value: int) -> int:
    """The largest of the ranks' numbers: one collective, none for a single process."""
    if accelerator.num_processes == 1:
        return value
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())


def gradient_norm(model: torch.nn.Module) -> float:
    """The norm of all gradients together; of a model that FSDP has spread, of all its parts: a collective then."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank: one collective, none for a single process."""
    state = PartialState()
    if state.num_processes == 1:
        return flag
    return bool(reduce(torch.tensor(float(flag), device=state.device), reduction="sum") > 0)


def all_rows(rows: Sequence[Any]) -> list[Any]:
    """The ranks' lists joined in rank order, on every rank; the elements are picklable."""
    return gather_object(list(rows))


def share(items: Sequence[Any], state: PartialState | Accelerator) -> list[Any]:
    """This rank's part, every world-size-th item: the parts differ in length by one at most."""
    return list(items[state.process_index :: state.num_processes])


def equal_share(items: Sequence[Any], state: PartialState | Accelerator) -> tuple[list[Any], Tensor]:
    """This rank's part, filled up to the same length on all ranks, and bool [B], False on what is filler.

    Lock-step needs equal lengths: under a sharded engine every forward pass is a collective.
    """
    per_rank = -(-len(items) // state.num_processes)
    part = share(items, state)
    real = torch.arange(per_rank) < len(part)
    return part + [items[0]] * (per_rank - len(part)), real


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


def leave_together() -> None:
    """End one of several processes once all of them are done, without tearing down what they shared.

    The interpreter's own end sometimes aborts under DeepSpeed with gloo (SIGABRT), and the launcher would call a
    stage failed that has written everything.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and PartialState().num_processes > 1:
        wait_for_everyone()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
