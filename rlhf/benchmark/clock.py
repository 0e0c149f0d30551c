"""Time per phase and peak memory of a run."""

import time
from typing import Any

import torch
from transformers import TrainerCallback

from rlhf.perf.hardware import peak_memory


class Clock(TrainerCallback):
    """Seconds of each phase of each step; waits for the GPU at every mark."""

    def __init__(self, last: str) -> None:
        """last: the phase that ends at the end of a step."""
        self.steps: list[dict[str, float]] = [{}]
        self.end, self.at = last, time.perf_counter()

    def mark(self, phase: str) -> None:
        """Add the time since the last mark to this phase."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.steps[-1][phase] = self.steps[-1].get(phase, 0.0) + now - self.at
        self.at = now

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.at = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End the step and start the next one."""
        self.mark(self.end)
        self.steps.append({})


def most_memory() -> int:
    """Peak memory so far in bytes: on the accelerator, otherwise resident."""
    return peak_memory(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
