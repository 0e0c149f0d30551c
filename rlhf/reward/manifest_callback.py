"""Manifests for the checkpoints of transformers' Trainer, which then have the same protection as PPO's."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator, PartialState
from transformers import TrainerCallback, TrainerState, TrainingArguments

from rlhf.distributed.collectives import from_main, wait_for_everyone
from rlhf.storage.checkpoint import REWARD, SAVE_ERRORS, not_written, numbered, rotate, run_facts, write_step
from rlhf.storage.disk import MANIFEST, write_manifest
from rlhf.tracking.recorder import flush_events, save_rows


def step_facts(accelerator: Accelerator, args: TrainingArguments) -> dict[str, object]:
    """The facts of step.json besides the step: pairs per update, processes, engine."""
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    return {"batch_size": size, **run_facts(accelerator)}


class ManifestCallback(TrainerCallback):
    """Completes each checkpoint once all ranks have written their files, and only then deletes older ones.

    It copies the logged rows into the checkpoint, and writes step.json and the manifest. Use it as a `with` block
    around training. Inside, the Trainer has no save_total_limit, since it would delete too early. A checkpoint that
    could not be written is removed, and raises a UserError. facts: returns the content of step.json; set it before
    training.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.args, self.limit = args, args.save_total_limit
        self.folder = Path(args.output_dir or ".")
        self.facts: Callable[[], Mapping[str, object]] = dict

    def __enter__(self) -> "ManifestCallback":
        self.args.save_total_limit = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.args.save_total_limit = self.limit
        incomplete = [path for path in numbered(self.folder, REWARD) if not (path / MANIFEST).exists()]
        if incomplete and isinstance(error, SAVE_ERRORS):
            if PartialState().is_main_process:
                shutil.rmtree(incomplete[-1], ignore_errors=True)
            raise not_written(incomplete[-1], error) from error

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """The best checkpoint so far is in this folder, even if it was written before the run was moved."""
        if state.best_model_checkpoint:
            state.best_model_checkpoint = str(self.folder / Path(state.best_model_checkpoint).name)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Rows, step.json, manifest, then the limit."""
        wait_for_everyone()
        # Each rank asks its own file system whether that checkpoint exists, but all must load the same one at the end.
        state.best_model_checkpoint = from_main(lambda: state.best_model_checkpoint)
        checkpoint = self.folder / f"{REWARD}{state.global_step}"
        best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None

        facts = self.facts()

        def complete() -> None:
            save_rows(self.folder, checkpoint)
            flush_events(self.folder / "tensorboard")
            write_step(checkpoint, state.global_step, facts)
            write_manifest(checkpoint)
            rotate(checkpoint, REWARD, self.limit, best)

        from_main(complete)
