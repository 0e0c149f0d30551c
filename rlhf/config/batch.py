"""The global batch, and the part of it that each process takes at a time."""

from typing import Any

from rlhf.distributed.devices import process_count
from rlhf.errors import UserError
from rlhf.file_types import BatchFacts

_FIELD = "global_batch_size"


def divide_global_batch(args: Any) -> None:
    """Set per_device_train_batch_size and gradient_accumulation_steps so that their product over all processes is
    global_batch_size, if that is set.

    Lowers per_device_train_batch_size to a process's share if that is smaller. A UserError if the numbers do not
    divide, with the nearest that do, or if gradient_accumulation_steps contradicts global_batch_size.
    """
    size, processes, rows = args.global_batch_size, process_count(), args.per_device_train_batch_size
    if size is None:
        return
    share, rest = divmod(size, processes)
    if rest or not share:
        raise UserError(
            f"{_FIELD}: expected a multiple of the number of processes, {processes}, found {size}: "
            f"start {_near(size, processes, size)} processes, or use {_near_multiples(size, processes)}"
        )
    rows = min(rows, share)
    if share % rows:
        raise UserError(
            f"per_device_train_batch_size: expected a divisor of a process's share of {_FIELD}, "
            f"{size} / {processes} = {share}, such as {_near(share, rows, share)}, found {rows}"
        )
    given, derived = args.gradient_accumulation_steps, share // rows
    if given not in (1, derived):  # 1 is the default
        raise UserError(
            f"gradient_accumulation_steps: remove {given}, or set {derived}, which follows from {_FIELD} {size}"
        )
    args.per_device_train_batch_size, args.gradient_accumulation_steps = rows, derived


def _near(number: int, found: int, most: int) -> str:
    """The divisors of `number` next to `found`, below and above, as text."""
    near = [n for n in range(1, min(most, 100_000) + 1) if number % n == 0]
    below = max((n for n in near if n < found), default=None)
    above = min((n for n in near if n > found), default=None)
    return " or ".join(str(n) for n in (below, above) if n is not None)


def _near_multiples(size: int, processes: int) -> str:
    below = size // processes * processes
    return " or ".join(str(n) for n in (below, below + processes) if n)


def batch_facts(args: Any) -> BatchFacts:
    """How the batch of an optimizer step (PPO: of a rollout) is made up, for run.json."""
    rows, parts, processes = args.per_device_train_batch_size, args.gradient_accumulation_steps, process_count()
    return {
        "global_batch_size": rows * parts * processes,
        "processes": processes,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": parts,
    }


def batch_line(args: Any, rows: str) -> str:
    """`batch_facts` in one line. rows: what the rows are, such as "pairs"."""
    facts = batch_facts(args)
    return (
        f"batch: {facts['global_batch_size']} {rows} per step = {facts['processes']} processes x "
        f"{facts['per_device_train_batch_size']} {rows} at a time x {facts['gradient_accumulation_steps']} "
        "(gradient_accumulation_steps)"
    )
