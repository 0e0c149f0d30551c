"""Stop signals: SIGUSR1 from Slurm before a time limit, SIGTERM from a scheduler, Ctrl-C, a closed terminal.

A first one is a request: what runs is finished or given up, and its place is kept. A second Ctrl-C ends it at once.
"""

import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.distributed.collectives import any_rank

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# A shell lets what it starts in the background ignore Ctrl-C, and `nohup` a closed terminal.
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)

_ONE_PRESS = 1.0  # seconds: a terminal and a launcher both hand on the same Ctrl-C, and people press twice


class _Handlers:
    """Handlers of signals, which are as before after a `with` block."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class StopRequest(_Handlers):
    """Inside its `with` block a stop signal is only recorded, so that the current step can be finished and saved.

    A second Ctrl-C raises KeyboardInterrupt. Nested requests share signals: the inner one knows those received before,
    the outer one learns of later ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received = False
        self._outer: StopRequest | None = None
        self._pressed: float | None = None  # when Ctrl-C was

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread handle signals
        for number in SIGNALS:
            if number in _MAY_BE_IGNORED and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._remember)
            outer = getattr(self._before[number], "__self__", None)
            if isinstance(outer, StopRequest):
                self._outer = outer
                self.received |= outer.received
                self._pressed = outer._pressed
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now, before = time.monotonic(), self._pressed
        for request in self._all():
            request.received = True
            if number == signal.SIGINT:
                request._pressed = now
        if number == signal.SIGINT and before is not None and now - before > _ONE_PRESS:
            raise KeyboardInterrupt

    def _all(self) -> Iterator["StopRequest"]:
        yield self
        if self._outer:
            yield from self._outer._all()

    def asked(self) -> bool:
        """Whether any rank received a stop signal; the same answer on all ranks, by one small collective."""
        return any_rank(self.received)


class StopAtOnce(_Handlers):
    """Inside its `with` block a stop signal raises KeyboardInterrupt: for work whose parts are kept as they come.

    Later signals do not disturb what is then put in order, but for Ctrl-C after a second or more.
    """

    def __init__(self) -> None:
        super().__init__()
        self._first: float | None = None  # when the first one came

    def __enter__(self) -> "StopAtOnce":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number not in _MAY_BE_IGNORED or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def _stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None or (number == signal.SIGINT and now - self._first > _ONE_PRESS):
            self._first = self._first or now
            raise KeyboardInterrupt


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
            args.save_only_model = False  # this checkpoint is to resume from
        return control
