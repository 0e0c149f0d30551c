"""Everything that crosses processes; no other file names a collective."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf.config.common import check_device_count, cpu_is_asked_for
from rlhf.functional.precision import wide

Answer = TypeVar("Answer")


def join_processes(timeout: int) -> PartialState:
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


def on_all(do: Callable[[], None]) -> None:
    """Every rank does it: one collective. Where any fails all end, and the first of those alone says why."""
    state, failed = PartialState(), None
    try:
        do()
    except Exception as error:
        failed = error
    broken = all_rows([failed is not None])
    if not any(broken):
        return
    if failed is not None and broken.index(True) == state.process_index:
        raise failed
    raise SystemExit(2)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Rank 0 of each machine runs the block before the others: what it fetches, they find in the cache."""
    with PartialState().local_main_process_first():
        yield


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
