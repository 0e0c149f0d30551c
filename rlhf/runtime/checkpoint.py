"""Checkpoints of a PPO run: everything that the next step depends on, whole or absent."""

import json
import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from rlhf.errors import UserError

STEP_FILE = "step.json"


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, limit: int | None) -> Path:
    """Write FOLDER/checkpoints/step-N: models, optimizer, scheduler, KL coefficient, random states.

    Written aside and renamed. With a limit, the oldest checkpoints beyond it are deleted afterwards.
    """
    target = folder / "checkpoints" / f"step-{step}"
    aside = target.with_name(f".{target.name}")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (aside / STEP_FILE).write_text(json.dumps({"step": step}), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        for old in checkpoints(folder)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> int:
    """Restore what save_checkpoint wrote and return the number of the last step done."""
    if not (checkpoint / STEP_FILE).is_file():
        found = f"no {STEP_FILE} in it" if checkpoint.is_dir() else "no such folder"
        raise UserError(
            f"resume_from_checkpoint {checkpoint}: expected a folder like checkpoints/step-N, found {found}"
        )
    accelerator.load_state(str(checkpoint))
    return json.loads((checkpoint / STEP_FILE).read_text(encoding="utf-8"))["step"]


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (path.parent for path in (folder / "checkpoints").glob(f"step-*/{STEP_FILE}"))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))
