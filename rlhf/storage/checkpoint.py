"""Checkpoints: everything that the next step depends on; complete or absent; resumed from the newest intact one."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from safetensors import SafetensorError

from rlhf.console import screen
from rlhf.distributed.collectives import from_main
from rlhf.distributed.launch import engine_name
from rlhf.errors import UserError
from rlhf.file_types import CheckpointFacts, StepFile
from rlhf.storage.disk import MANIFEST, fault

PPO, REWARD = "step-", "checkpoint-"  # folder names, before the number of the step

STEP_FILE = "step.json"

_LEFT = "left-"

SAVE_ERRORS = (OSError, SafetensorError, RuntimeError)  # what different writers raise on a full disk

# In PPO these decide which prompts each step gets, with which random numbers, and what saved states mean.
_DATA = ("train_dataset", "seed", "data_seed", "optim", "score_norm_samples")


def not_written(target: Path, problem: Exception) -> UserError:
    """The error for a checkpoint that could not be written and has been removed."""
    reason = getattr(problem, "strerror", None) or " ".join(str(problem).split())[:200]
    room = shutil.disk_usage(target.parent).free / 1e6 if target.parent.exists() else 0.0
    earlier = [path.name for path in numbered(target.parent, target.name.rpartition("-")[0] + "-")]
    kept = ", ".join(name for name in earlier if name != target.name) or "there are none"
    return UserError(
        f"{target}: cannot write the checkpoint: {reason} ({room:.1f} MB are free); free some space; "
        f"its files were removed, earlier checkpoints are kept: {kept}"
    )


def run_facts(accelerator: Accelerator) -> CheckpointFacts:
    """What a checkpoint's files depend on besides the settings."""
    return {"processes": accelerator.num_processes, "engine": engine_name(accelerator)}


def write_step(checkpoint: Path, step: int, facts: Mapping[str, object]) -> None:
    """CHECKPOINT/step.json."""
    (checkpoint / STEP_FILE).write_text(json.dumps({"step": step, **facts}), encoding="utf-8")


def read_step(checkpoint: Path, found: Mapping[str, object]) -> StepFile:
    """CHECKPOINT/step.json; a UserError if a run with the facts `found` cannot resume from it.

    The global batch size must be the same, because it decides which data each step gets; so must prompts and seeds if
    the checkpoint has them. Under data parallelism the number of processes may differ. Checkpoints of DeepSpeed and
    FSDP2 need as many processes as wrote them.
    """
    facts = _facts(checkpoint)
    if facts is None:
        raise UserError(f"{checkpoint / STEP_FILE}: not of a checkpoint that rlhf has written")
    sharded = any(name in f"{facts['engine']} {found['engine']}" for name in ("DEEPSPEED", "FSDP"))
    data = [name for name in _DATA if name in facts]
    written = cast(Mapping[str, object], facts)
    for name in ("batch_size", *(("engine", "processes") if sharded else ()), *data):
        if written[name] != found.get(name):
            raise UserError(
                f"{checkpoint}: written with {name} {written[name]}, but this run has {found.get(name)}"
                + ("; see gradient_accumulation_steps" if name == "batch_size" else "; use the same to resume")
            )
    return facts


def _facts(checkpoint: Path, read: Callable[[StepFile], object] = dict) -> StepFile | None:
    """CHECKPOINT/step.json; None if `write_step` did not write it, which a manifest cannot tell."""
    try:
        facts = json.loads((checkpoint / STEP_FILE).read_text(encoding="utf-8"))
        read(facts)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, OverflowError):
        return None
    known = isinstance(facts, dict) and {"step", "batch_size", "engine", "processes"} <= facts.keys()
    return cast(StepFile, facts) if known else None


def numbered(folder: Path, prefix: str) -> list[Path]:
    """Folders named PREFIX and a number, lowest first. Clocks play no part."""
    found = (path for path in folder.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdecimal())
    return sorted((path for path in found if path.is_dir()), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The number in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a PPO run, oldest first; their contents are not checked."""
    return [path for path in numbered(folder / "checkpoints", PPO) if (path / MANIFEST).is_file()]


def problem_of(checkpoint: Path, read: Callable[[StepFile], object] = dict) -> str | None:
    """What is wrong with a checkpoint; None if it is intact and of the step in its name.

    read: takes what a stage needs from step.json, and raises if that is missing.
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
    """The intact checkpoint with the highest number, the same on all ranks; None if there are no checkpoints.

    Prints one line for each broken one that it skips. A UserError if all are broken.
    """
    return from_main(lambda: _newest(numbered(folder, prefix), problem))


def _newest(found: list[Path], problem: Callable[[Path], str | None]) -> Path | None:
    broken: list[str] = []
    unfinished: list[str] = []
    for checkpoint in reversed(found):
        reason = problem(checkpoint)
        if reason is None:
            _say([*broken, *unfinished], f"resuming from {checkpoint.name}")
            return checkpoint
        # transformers writes in place: a run that is killed meanwhile leaves an unfinished checkpoint.
        never = checkpoint.name.startswith(REWARD) and not (checkpoint / MANIFEST).exists()
        (unfinished if never else broken).append(f"{checkpoint}: broken checkpoint, found {reason}")
    if broken:
        more = f"; {len(broken) - 1} older checkpoints are broken, too" if broken[1:] else ""
        raise UserError(f"{broken[0]}{more}; move them away to start from the beginning")
    _say(unfinished, "starting from the beginning")
    return None


def _say(lines: list[str], then: str) -> None:
    for line in lines:
        screen.warn(f"skipped {line}; {then}")


def set_later_aside(folder: Path, prefix: str, step: int, limit: int | None = None) -> None:
    """Rename checkpoints after `step`, which a run resumes from, to left-NAME: broken or of an abandoned run.

    Otherwise the folder would mix two histories, and `limit` would delete new checkpoints before old ones. At most
    `limit` renamed checkpoints are kept, those of this call first; a checkpoint renamed earlier is replaced by one of
    the same step unless only the earlier one is intact.
    """
    later = [checkpoint for checkpoint in numbered(folder, prefix) if checkpoint_step(checkpoint) > step]
    for checkpoint in later:
        _set_aside(checkpoint)
    fresh = {f"{_LEFT}{checkpoint.name}" for checkpoint in later}
    left = sorted(numbered(folder, f"{_LEFT}{prefix}"), key=lambda path: (path.name in fresh, checkpoint_step(path)))
    spare = left[:-limit] if limit else []
    # Delete only if something intact remains: the checkpoint to resume from, or one of those that are kept.
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
    """Delete the oldest checkpoints beyond the limit, but never the newest, just written, or the best."""
    if not limit:
        return
    found = numbered(newest.parent, prefix)
    spare = [path for path in found if path.name not in (newest.name, best)]
    keep = max(limit - (len(found) - len(spare)), 0)
    for old in spare[: len(spare) - keep]:
        remove(old)


def remove(checkpoint: Path) -> None:
    """Rename before deleting, so that an interrupted delete never looks like a broken checkpoint."""
    if checkpoint.exists():
        gone = checkpoint.with_name(f".{checkpoint.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(checkpoint, gone)
        shutil.rmtree(gone, ignore_errors=True)
