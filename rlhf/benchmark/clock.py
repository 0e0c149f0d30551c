"""Where a run's time and memory went."""

import time
from typing import Any

import torch
from transformers import TrainerCallback

from rlhf.perf.hardware import peak_memory


class Clock(TrainerCallback):
    """Seconds of each phase of each step; a GPU's queue is empty at every mark."""

    def __init__(self, last: str) -> None:
        """last: the phase that ends with a step."""
        self.steps: list[dict[str, float]] = [{}]
        self.end, self.at = last, time.perf_counter()

    def mark(self, phase: str) -> None:
        """All the time since the last mark was this phase's."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.steps[-1][phase] = self.steps[-1].get(phase, 0.0) + now - self.at
        self.at = now

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first step starts."""
        self.at = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step ends, and the next one starts."""
        self.mark(self.end)
        self.steps.append({})


def most_memory() -> int:
    """The most bytes that were held so far: resident, or on the accelerator."""
    return peak_memory(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
