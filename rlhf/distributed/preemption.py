"""Stop signals: SIGUSR1 from Slurm before a time limit or on preemption, SIGTERM from a scheduler or a person."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.distributed.collectives import any_rank

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Inside its `with` block a stop signal is only recorded, so that the current step can be finished and saved.

    Nested requests share signals: the inner one knows those received before, the outer one learns of later ones.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}
        self._outer: StopRequest | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread handle signals
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
            outer = getattr(self._before[number], "__self__", None)
            if isinstance(outer, StopRequest):
                self._outer = outer
                if outer.received:
                    self.received = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self._outer:
            self._outer._remember(number, frame)

    def asked(self) -> bool:
        """Whether any rank received a stop signal; the same answer on all ranks, by one small collective."""
        return any_rank(self.received)


class StopCallback(TrainerCallback):
    """Makes transformers' Trainer save and end after the step in which a stop signal arrives."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Request a checkpoint and the end of training, in the same step on all ranks."""
        if state.global_step < state.max_steps and self.request.asked():
            self.stopped = control.should_save = control.should_training_stop = True
        return control
