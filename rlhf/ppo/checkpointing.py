"""Checkpoints of a PPO run: when one is written, what is in it, and how a run resumes from it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from rlhf.config import PPOConfig
from rlhf.console import screen
from rlhf.distributed.collectives import from_main, on_all
from rlhf.distributed.launch import is_deepspeed, is_fsdp
from rlhf.distributed.sharded_state import load_state
from rlhf.distributed.trained_weights import frozen_norms, load_trained, same_norms
from rlhf.errors import UserError
from rlhf.file_types import StepFile
from rlhf.ppo.advantages import AdaptiveKLController
from rlhf.ppo.callbacks import STATE_FILE, Callbacks
from rlhf.ppo.evaluation import metric_named
from rlhf.ppo.health import HealthMonitor
from rlhf.ppo.optim import options_as_set
from rlhf.ppo.prompts import Prompt
from rlhf.storage.checkpoint import PPO, STEP_FILE, newest_whole, problem_of, read_step, run_facts
from rlhf.storage.disk import fault
from rlhf.storage.safe_load import check_pickles
from rlhf.storage.saver import Saver
from rlhf.tracking.recorder import Recorder
from rlhf.tracking.skipped_updates import Skips


class Checkpoints:
    """Writes the checkpoints of a PPO run and loads them again; `PPOTrainer` says when."""

    def __init__(
        self,
        args: PPOConfig,
        accelerator: Accelerator,
        folder: Path,
        trained: torch.nn.Module,
        prompts: Sequence[Prompt],
        batch_size: int,
        callbacks: Callbacks,
        recorder: Recorder,
        skips: Skips,
        health: HealthMonitor,
        optimizer: Any,
        scheduler: Any,
        kl_control: AdaptiveKLController,
        optim: type,
    ) -> None:
        """trained: the model before it was prepared, which is already registered with the accelerator.

        optim: class of the optimizer, below what an engine has put around it.
        """
        self.args, self.accelerator, self.folder = args, accelerator, folder
        self.callbacks, self.recorder, self.skips, self.health = callbacks, recorder, skips, health
        self.optimizer, self.scheduler, self.kl_control, self.optim = optimizer, scheduler, kl_control, optim
        self.saver = Saver(accelerator, folder, trained)
        self.is_due = False  # one was asked for while updates were being skipped
        # What decides which prompts a step gets, its random numbers, and what is not saved: a run that resumes must
        # have the same.
        self.facts = {
            "batch_size": batch_size,
            "train_dataset": digest(prompts),
            "seed": args.seed,
            "data_seed": args.seed if args.data_seed is None else args.data_seed,
            "optim": optim.__name__,
            "score_norm_samples": args.score_norm_samples,  # scores are scaled by what was found before step 1
            "kl_coef": args.kl_coef,
            "metric_for_best_model": args.metric_for_best_model,  # with another one, earlier checkpoints do not count
            "frozen": frozen_norms(trained),  # norms of the weights that are never trained
        }

    def load(self, checkpoint: str | Path | bool | None) -> tuple[int, int]:
        """Load a checkpoint folder, or with True the run's newest whole one; returns its step and episode.

        Without one to load both are 0. A damaged checkpoint is a UserError and nothing of it is loaded.
        """
        if not checkpoint:
            return 0, 0
        found = self._find(checkpoint)
        facts = self._load(found)
        # An adaptive coefficient goes on where it was, unless another one to start from is asked for.
        if self.args.kl_target is None or facts.get("kl_coef", self.args.kl_coef) != self.args.kl_coef:
            self.kl_control.kl_coef = self.args.kl_coef
        on_all(lambda: self._restore(found, facts))
        self._keep_best(facts)
        self.recorder.load(found)
        return facts["step"], int(facts["episode"])

    def _load(self, checkpoint: Path) -> StepFile:
        with options_as_set(self.optimizer, self.scheduler, self.optim):
            return load_checkpoint(self.accelerator, checkpoint, self.facts)

    def load_best(self) -> str:
        """Load the weights of the best checkpoint, which this run has written; returns a line on it."""
        best = self._best()
        if best is None:
            return "load_best_model_at_end: no checkpoint was evaluated, the last weights stay"
        if problem := from_main(lambda: problem_of(best)):
            raise UserError(f"{best}: broken, found {problem}; run again to keep the last weights instead")
        self._load(best)
        return f"best checkpoint: {best.name}, {self.args.metric_for_best_model} {self.callbacks.state.best_metric:.4g}"

    def _best(self) -> Path | None:
        step = self.callbacks.state.best_global_step
        return None if step is None else self.folder / "checkpoints" / f"{PPO}{step}"

    def _keep_best(self, facts: StepFile) -> None:
        """On resume: forget a best checkpoint that is no longer whole, or was chosen by another metric."""
        best, state = self._best(), self.callbacks.state
        if best is None:
            return
        problem = from_main(lambda: problem_of(best))
        if facts.get("metric_for_best_model") != self.args.metric_for_best_model:
            problem = "another metric_for_best_model"
        if problem is not None:
            screen.warn(f"{best}: no longer the best checkpoint, found {problem}; later ones count")
            state.best_metric = state.best_global_step = None

    def _note_best(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """Before a checkpoint is written: is it the best of those that were evaluated?"""
        wanted, state = self.args.metric_for_best_model, self.callbacks.state
        if wanted is None or not metrics:
            return
        value, best = metric_named(wanted, metrics), state.best_metric
        if best is None or (value > best if self.args.greater_is_better else value < best):
            state.best_metric, state.best_global_step = value, step

    def _find(self, checkpoint: str | Path | bool) -> Path:
        if isinstance(checkpoint, bool):
            newest = newest_whole(self.folder / "checkpoints", PPO)
            if newest is None:
                raise UserError(f"resume_from_checkpoint: there are no checkpoints in {self.folder} to resume from")
            return newest
        found = Path(checkpoint)
        problem = from_main(lambda: fault(found) if found.is_dir() else "no such folder")
        if problem:
            raise UserError(
                f"resume_from_checkpoint {found}: expected a folder like checkpoints/step-N, found {problem}"
            )
        return found

    def _restore(self, checkpoint: Path, facts: StepFile) -> None:
        with _as_written(checkpoint / STEP_FILE):
            self.skips.in_a_row = int(facts["skipped_in_a_row"])
            self.health.load(facts["warnings"])
            int(facts["episode"])
        with _as_written(checkpoint / STATE_FILE):
            self.callbacks.load(checkpoint)

    def save_if_due(self, step: int, episode: int, metrics: Mapping[str, float] | None = None) -> bool:
        """Save if callbacks or save_minutes ask for it; returns whether a checkpoint was written.

        metrics: of this step's evaluation, if there was one.

        While updates are being skipped none is written: `save_total_limit` would delete the last good ones as a run
        breaks down. It is made up for at the next good step. A UserError if the checkpoint before failed.
        """
        self.saver.check()
        minutes = self.args.save_minutes
        self.is_due |= self.callbacks.pop("save")
        self.is_due |= minutes is not None and self.saver.is_due(minutes)
        if not self.is_due or self.skips.in_a_row:
            return False
        self.is_due = False
        self._note_best(step, metrics)
        self.save(step, episode)
        return True

    def save(self, step: int, episode: int) -> None:
        """A checkpoint of this step, which is over."""
        skipped = self.skips.in_a_row
        facts = self.facts | {"skipped_in_a_row": skipped, "episode": episode, "warnings": self.health.state()}
        # A run that is told to stop while updates are being skipped keeps its place, but deletes no good checkpoint.
        limit = None if skipped else self.args.save_total_limit
        # Callbacks that are told of a checkpoint must find it.
        best = self._best()
        kept = None if best is None else best.name
        self.saver.write(step, limit, facts, self._save_beside, self.callbacks.listens("on_save"), kept)
        self.callbacks.event("on_save")

    def _save_beside(self, checkpoint: Path) -> None:
        self.callbacks.save(checkpoint)
        self.recorder.save(checkpoint)


def digest(prompts: Sequence[Prompt]) -> str:
    """How many prompts there are, which, and in what order: ids alone may be row numbers."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(repr((prompt.prompt_id, prompt.input_ids)).encode("utf-8", "surrogatepass"))
    return f"{len(prompts)} prompts {found.hexdigest()[:16]}"


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, found: dict[str, Any]) -> StepFile:
    """Restore what a Saver wrote, with one rank's weights on any number of ranks, and return step.json.

    found: what of this run is to be as it was, beside `run_facts`.
    """
    facts = from_main(lambda: _read_facts(checkpoint, {**run_facts(accelerator), **found}))
    on_all(lambda: check_pickles(checkpoint))  # Accelerate unpickles files in there
    if is_deepspeed(accelerator):  # it runs its own collectives in there
        _load_state(accelerator, checkpoint, custom_load_fn=load_trained)
    elif is_fsdp(accelerator):
        _load_state(accelerator, checkpoint)
    else:  # via main memory: Accelerate would load the optimizer's file onto each GPU, beside the states it replaces
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
