"""Checkpoints of `PPOTrainer`: when one is written, what is in it, and going on from it."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from rlhf.config import PPOConfig
from rlhf.distributed.collectives import from_main, on_all
from rlhf.distributed.launch import is_deepspeed, is_fsdp
from rlhf.distributed.sharded_state import load_state
from rlhf.distributed.trained_weights import load_trained, same_norms
from rlhf.errors import UserError
from rlhf.file_types import StepFile
from rlhf.ppo.callbacks import STATE_FILE, Flow
from rlhf.ppo.health import Watch
from rlhf.ppo.learner import Learner
from rlhf.ppo.prompts import Prompt
from rlhf.storage.checkpoint import PPO, STEP_FILE, newest_whole, read_step, run_facts
from rlhf.storage.disk import fault
from rlhf.storage.safe_load import check_pickles
from rlhf.storage.saver import Saver
from rlhf.tracking.recorder import Recorder


class Resumable:
    """What of a trainer writes and reads checkpoints; the attributes are set by `PPOTrainer`'s constructor."""

    args: PPOConfig
    accelerator: Accelerator
    prompts: list[Prompt]
    batch_size: int
    num_total_batches: int
    flow: Flow
    learner: Learner
    recorder: Recorder
    saver: Saver
    watch: Watch
    frozen: dict[str, float]  # norms of the weights that are never trained, which checkpoints do not hold
    episode: int  # responses so far, over all ranks
    stopped: bool  # told to stop by a signal, before the last step
    save_is_due: bool  # a checkpoint was to be written, and updates were being left out

    @property
    def folder(self) -> Path:
        """Where the run writes: output_dir, or the current folder."""
        return Path(self.args.output_dir or ".")

    def resume(self, checkpoint: str | Path | bool = True) -> int:
        """For a loop of one's own, before its first step: go on from a checkpoint folder, or the run's newest one.

        Returns the number of its step. `train` does this itself, see its resume_from_checkpoint.
        """
        self.flow.state.global_step = self._resume(checkpoint)
        return self.flow.state.global_step

    def _resume(self, checkpoint: str | Path | bool | None) -> int:
        """Load the checkpoint, if any; returns the number of its step. One that is broken is not loaded."""
        if not checkpoint:
            return 0
        if checkpoint is True:
            found = newest_whole(self.folder / "checkpoints", PPO)
            if found is None:
                raise UserError(f"resume_from_checkpoint: expected checkpoints in {self.folder}, found none")
        else:
            found = Path(checkpoint)
            problem = from_main(lambda: fault(found) if found.is_dir() else "no such folder")
            if problem:
                raise UserError(
                    f"resume_from_checkpoint {found}: expected a folder like checkpoints/step-N, found {problem}"
                )
        facts = load_checkpoint(self.accelerator, found, self._data_facts())
        on_all(lambda: self._restore(found, facts))
        self.recorder.load(found)
        return facts["step"]

    def _restore(self, checkpoint: Path, facts: StepFile) -> None:
        with _as_written(checkpoint / STEP_FILE):
            self.learner.skips.in_a_row = int(facts["skipped_in_a_row"])
            self.watch.load(facts["warnings"])
            self.episode = int(facts["episode"])
        with _as_written(checkpoint / STATE_FILE):
            self.flow.load(checkpoint)

    def _data_facts(self) -> dict[str, Any]:
        """What decides which prompts a step gets, its random numbers, and what is not saved: the same on going on."""
        args = self.args
        seeds = {"seed": args.seed, "data_seed": args.seed if args.data_seed is None else args.data_seed}
        data = {"batch_size": self.batch_size, "train_dataset": digest(self.prompts)}
        return data | seeds | {"frozen": self.frozen}

    def _save_if_due(self, step: int) -> bool:
        """Where a checkpoint was asked for, and no update has been left out since the last one that was not.

        Else `save_total_limit` would delete the last good ones as a run breaks down: it is made up for at the next
        good step. Returns whether one was written. A UserError where the one before could not be made whole.
        """
        self.saver.check()
        minutes = self.args.save_minutes
        self.save_is_due |= self.flow.take("save")
        self.save_is_due |= minutes is not None and self.saver.is_due(minutes)
        if not self.save_is_due or self.learner.skips.in_a_row:
            return False
        self.save_is_due = False
        self._save(step)
        return True

    def _save(self, step: int) -> None:
        """A checkpoint of this step, which is over."""
        skipped = self.learner.skips.in_a_row
        facts = self._data_facts() | {"skipped_in_a_row": skipped, "episode": self.episode}
        facts["warnings"] = self.watch.state()
        # Told to stop as updates are being left out, a run keeps its place, but for that no good checkpoint goes.
        limit = None if skipped else self.args.save_total_limit
        # A callback that is told of a checkpoint is to find it.
        self.saver.write(step, limit, facts, self._save_beside, wait=self.flow.listens("on_save"))
        self.flow.event("on_save")

    def _save_beside(self, checkpoint: Path) -> None:
        self.flow.save(checkpoint)
        self.recorder.save(checkpoint)

    def _stop(self, step: int) -> None:
        """Leave a checkpoint of this step, unless there is one or the run is over."""
        self.stopped = step < self.num_total_batches
        if self.stopped and self.saver.step != step:  # not by the folder: a network shows it to each rank in its time
            self._save(step)


def digest(prompts: Sequence[Prompt]) -> str:
    """How many prompts there are, and which, in what order: ids alone may be numbers of rows."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(repr((prompt.prompt_id, prompt.input_ids)).encode("utf-8", "surrogatepass"))
    return f"{len(prompts)} prompts {found.hexdigest()[:16]}"


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, found: dict[str, Any]) -> StepFile:
    """Restore what a Saver wrote, with one rank's weights on any number of ranks, and return step.json.

    found: what of this run is to be as it was, beside `run_facts`.
    """
    facts = from_main(lambda: _read_facts(checkpoint, {**run_facts(accelerator), **found}))
    on_all(lambda: check_pickles(checkpoint))  # Accelerate unpickles what it takes for its own
    if is_deepspeed(accelerator):  # it has collectives of its own in there
        _load_state(accelerator, checkpoint, custom_load_fn=load_trained)
    elif is_fsdp(accelerator):
        _load_state(accelerator, checkpoint)
    else:  # in main memory: on several GPUs Accelerate would hold the optimizer's file on each beside its own states
        on_all(lambda: _load_state(accelerator, checkpoint, map_location="cpu"))
    return facts


def _read_facts(checkpoint: Path, found: dict[str, Any]) -> StepFile:
    facts = read_step(checkpoint, found)
    with _as_written(checkpoint / STEP_FILE):
        same = same_norms(dict(facts.get("frozen", found["frozen"])), found["frozen"])
    if not same:
        raise _others(checkpoint, "other weights below what is trained")
    return facts


def _load_state(accelerator: Accelerator, checkpoint: Path, **options: Any) -> None:
    try:
        load_state(accelerator, checkpoint, **options)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError, ValueError, SafetensorError) as error:  # what torch and safetensors say
        raise _others(checkpoint, str(error)) from error


def _others(checkpoint: Path, found: str) -> UserError:
    return UserError(
        f"{checkpoint}: expected the models and the optimizer that it was written with (model_name_or_path, "
        f"critic, lora_r, optim, ...), found others: {' '.join(found.split())[:300]}"
    )


@contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """What goes wrong with a file's content as one line for the user."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: expected what a PPO run writes there, found {reason}") from error
