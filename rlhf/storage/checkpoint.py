"""Checkpoints: everything that the next step depends on, whole or absent, the newest whole one first."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from safetensors import SafetensorError

from rlhf.distributed.collectives import from_main
from rlhf.distributed.launch import engine_name
from rlhf.errors import UserError, printable
from rlhf.file_types import CheckpointFacts, StepFile
from rlhf.storage.disk import MANIFEST, fault

PPO, REWARD = "step-", "checkpoint-"  # what the folders are called, before the number of their step

STEP_FILE = "step.json"

_LEFT = "left-"

SAVE_ERRORS = (OSError, SafetensorError, RuntimeError)  # what a full disk looks like, by who writes

# What decides, in PPO, which prompts each step gets, and with which random numbers.
_DATA = ("train_dataset", "seed", "data_seed")


def not_written(target: Path, problem: Exception) -> UserError:
    """A checkpoint that failed and has been removed, as the user hears of it."""
    reason = getattr(problem, "strerror", None) or " ".join(str(problem).split())[:200]
    room = shutil.disk_usage(target.parent).free / 1e6 if target.parent.exists() else 0.0
    earlier = [path.name for path in numbered(target.parent, target.name.rpartition("-")[0] + "-")]
    kept = ", ".join(name for name in earlier if name != target.name) or "none there is"
    return UserError(
        f"{target}: expected to write a checkpoint there, found: {reason} ({room:.1f} MB are free); "
        f"nothing is left of it, earlier ones are kept: {kept}"
    )


def run_facts(accelerator: Accelerator) -> CheckpointFacts:
    """What the files of a checkpoint depend on besides the settings."""
    return {"processes": accelerator.num_processes, "engine": engine_name(accelerator)}


def write_step(checkpoint: Path, step: int, facts: Mapping[str, object]) -> None:
    """CHECKPOINT/step.json."""
    (checkpoint / STEP_FILE).write_text(json.dumps({"step": step, **facts}), encoding="utf-8")


def read_step(checkpoint: Path, found: Mapping[str, object]) -> StepFile:
    """CHECKPOINT/step.json; a UserError where the run that it is of cannot go on as `found`.

    Data are dealt by the responses or pairs of a step over all processes, so their number must be the same, and so
    must prompts and seeds where the checkpoint has them. Under data parallel the number of processes may differ;
    files of DeepSpeed and FSDP2 are of as many as wrote them.
    """
    facts = _facts(checkpoint)
    if facts is None:
        raise UserError(f"{checkpoint / STEP_FILE}: expected the facts of a checkpoint of rlhf, found none")
    sharded = any(name in f"{facts['engine']} {found['engine']}" for name in ("DEEPSPEED", "FSDP"))
    data = [name for name in _DATA if name in facts]
    written = cast(Mapping[str, object], facts)
    for name in ("batch_size", *(("engine", "processes") if sharded else ()), *data):
        if written[name] != found.get(name):
            raise UserError(
                f"{checkpoint}: expected {name} {written[name]}, with which it was written, found {found.get(name)}"
                + ("; see gradient_accumulation_steps" if name == "batch_size" else "")
            )
    return facts


def _facts(checkpoint: Path, read: Callable[[StepFile], object] = dict) -> StepFile | None:
    """CHECKPOINT/step.json; None where it is not what write_step writes, which a manifest does not tell."""
    try:
        facts = json.loads((checkpoint / STEP_FILE).read_text(encoding="utf-8"))
        read(facts)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, OverflowError):
        return None
    known = isinstance(facts, dict) and {"step", "batch_size", "engine", "processes"} <= facts.keys()
    return cast(StepFile, facts) if known else None


def numbered(folder: Path, prefix: str) -> list[Path]:
    """The folders in it that are called PREFIX and a number, lowest first; no clock decides."""
    found = (path for path in folder.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdecimal())
    return sorted((path for path in found if path.is_dir()), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The number in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a PPO run, oldest first; what is in them is not looked at."""
    return [path for path in numbered(folder / "checkpoints", PPO) if (path / MANIFEST).is_file()]


def problem_of(checkpoint: Path, read: Callable[[StepFile], object] = dict) -> str | None:
    """What is wrong with a checkpoint, None when it is whole and the one that its name says.

    read: takes what a stage needs out of its step.json; fails where that is not in it.
    """
    found = fault(checkpoint)
    if found is None:
        facts = _facts(checkpoint, read)
        if facts is None:
            found = f"a {STEP_FILE} that cannot be read"
        elif facts["step"] != checkpoint_step(checkpoint):
            found = f"step {facts['step']} in it"
    return found


def newest_whole(folder: Path, prefix: str, problem: Callable[[Path], str | None] = problem_of) -> Path | None:
    """The whole checkpoint with the highest number, None where there is no checkpoint at all; alike on all ranks.

    Says on one line which broken one it passed over, and why; a UserError where all are broken.
    """
    return from_main(lambda: _newest(numbered(folder, prefix), problem))


def _newest(found: list[Path], problem: Callable[[Path], str | None]) -> Path | None:
    broken: list[str] = []
    unfinished: list[str] = []
    for checkpoint in reversed(found):
        reason = problem(checkpoint)
        if reason is None:
            _say([*broken, *unfinished], f"going on from {checkpoint.name}")
            return checkpoint
        # transformers writes in place: a run that was killed meanwhile leaves one that was never finished.
        never = checkpoint.name.startswith(REWARD) and not (checkpoint / MANIFEST).exists()
        (unfinished if never else broken).append(f"{checkpoint}: expected a whole checkpoint, found {reason}")
    if broken:
        more = f"; {len(broken) - 1} older ones are broken, too" if broken[1:] else ""
        raise UserError(f"{broken[0]}{more}; move them away to start anew")
    _say(unfinished, "starting anew")
    return None


def _say(lines: list[str], then: str) -> None:
    for line in lines:
        print(printable(f"passed over {line}; {then}"))  # it names what a manifest names


def set_later_aside(folder: Path, prefix: str, step: int, limit: int | None = None) -> None:
    """Rename checkpoints of later steps than the one that a run goes on from: broken, or of a run that was left.

    Otherwise it would be of two histories, and its limit would delete its own checkpoints before those. There is one
    of a step, and with a limit as many as that, those of the last time first.
    """
    later = [checkpoint for checkpoint in numbered(folder, prefix) if checkpoint_step(checkpoint) > step]
    for checkpoint in later:
        _set_aside(checkpoint)
    fresh = {f"{_LEFT}{checkpoint.name}" for checkpoint in later}
    left = sorted(numbered(folder, f"{_LEFT}{prefix}"), key=lambda path: (path.name in fresh, checkpoint_step(path)))
    spare = left[:-limit] if limit else []
    # What a run goes on from is whole. One that begins has nothing else, should those that stay be broken.
    if spare and (step or any(fault(path) is None for path in left[len(spare) :])):
        for checkpoint in spare:
            remove(checkpoint)


def _set_aside(checkpoint: Path) -> None:
    left = checkpoint.with_name(f"{_LEFT}{checkpoint.name}")
    if left.exists() and fault(checkpoint) is not None and fault(left) is None:
        remove(checkpoint)
        return
    remove(left)
    os.replace(checkpoint, left)


def rotate(newest: Path, prefix: str, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints over the limit: never the newest, which has just been written, nor the best."""
    if not limit:
        return
    found = numbered(newest.parent, prefix)
    spare = [path for path in found if path.name not in (newest.name, best)]
    keep = max(limit - (len(found) - len(spare)), 0)
    for old in spare[: len(spare) - keep]:
        remove(old)


def remove(checkpoint: Path) -> None:
    """Out of sight at one stroke, lest half of it be taken for a broken one."""
    if checkpoint.exists():
        gone = checkpoint.with_name(f".{checkpoint.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(checkpoint, gone)
        shutil.rmtree(gone, ignore_errors=True)
