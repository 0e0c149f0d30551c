"""When to log, evaluate, save and stop: transformers' own state, control and callbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback, ExportableState

from rlhf.config import PPOConfig

STATE_FILE = "trainer_state.json"


class Callbacks:
    """Calls `TrainerCallback`s as transformers' Trainer does; a step is a PPO step.

    DefaultFlowCallback, first in the row, reads logging_*, eval_* and save_*; the user's callbacks come after
    it and may change what it decided.
    """

    def __init__(
        self, args: PPOConfig, callbacks: Sequence[type[TrainerCallback] | TrainerCallback], main: bool, **shown: Any
    ) -> None:
        """shown: what callbacks get as keyword arguments: model, processing_class, ..."""
        self.args, self.shown = args, shown
        self.state = TrainerState(is_local_process_zero=main, is_world_process_zero=main)
        self.control = TrainerControl()
        self.callbacks = [DefaultFlowCallback(), *(c() if isinstance(c, type) else c for c in callbacks)]

    def begin(self, step: int, max_steps: int, steps_per_epoch: float) -> None:
        """Before the first step, or the first after `step` when a run resumes."""
        state = self.state
        state.global_step, state.max_steps, state.epoch = step, max_steps, step / steps_per_epoch
        state.num_train_epochs = max(1, round(max_steps / steps_per_epoch))
        state.train_batch_size = self.args.per_device_train_batch_size
        state.compute_steps(self.args, max_steps)
        self.control = TrainerControl()
        self.event("on_train_begin")

    def save(self, checkpoint: Path) -> None:
        """Logs so far, and what callbacks remember, into a checkpoint."""
        remembered: Any = self.state.stateful_callbacks
        for callback in self.callbacks:
            if isinstance(callback, ExportableState):
                remembered[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(checkpoint / STATE_FILE))

    def load(self, checkpoint: Path) -> None:
        """Continue from what `save` wrote, except the step number, which the caller sets."""
        saved = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        remembered: Any = saved.stateful_callbacks
        self.state.log_history = saved.log_history
        self.state.best_metric, self.state.best_global_step = saved.best_metric, saved.best_global_step
        for callback in self.callbacks:
            if isinstance(callback, ExportableState) and type(callback).__name__ in remembered:
                vars(callback).update(remembered[type(callback).__name__]["attributes"])

    def event(self, name: str, **more: Any) -> None:
        """Tell all callbacks; what they return replaces the control."""
        for callback in self.callbacks:
            answer = getattr(callback, name)(self.args, self.state, self.control, **self.shown, **more)
            if answer is not None:
                self.control = answer

    def listens(self, name: str) -> bool:
        """Whether any callback handles this event."""
        return any(getattr(type(callback), name) is not getattr(TrainerCallback, name) for callback in self.callbacks)

    def pop(self, wish: str) -> bool:
        """Whether should_<wish> is set; asking unsets it."""
        wanted = getattr(self.control, f"should_{wish}")
        setattr(self.control, f"should_{wish}", False)
        return wanted
