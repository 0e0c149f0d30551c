"""Predicted time of a PPO step on a GPU that is not here: from counted kernels, bytes and FLOPs, beside the floor."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).with_name("kernels.json")
# By phase, what a step does how often; `step`: once.
UNITS = {
    "generate": ("tokens", "step"),
    "score": ("passes", "step"),
    "learn": ("micro_batches", "optimizer_steps", "step"),
    "rest": ("tokens", "step"),
}


@dataclass(frozen=True)
class Sizes:
    """How often a step does what."""

    layers: int
    tokens: int  # calls of the policy that decode one token each
    passes: int  # over finished texts, of all roles
    micro_batches: int  # of an optimizer step
    optimizer_steps: int

    def times(self, unit: str) -> int:
        """How often a step does `unit`, one of UNITS."""
        if unit == "micro_batches":
            return self.micro_batches * self.optimizer_steps
        return 1 if unit == "step" else int(getattr(self, unit))


def counted(work: dict[str, Any], sizes: Sizes) -> dict[str, dict[str, float]]:
    """Kernels and waits by phase. work: coefficients of full or lora, as kernels.json has them."""
    return {
        phase: {
            what: sum(
                sizes.times(unit) * (one[what]["fixed"] + one[what]["layer"] * sizes.layers)
                for unit, one in units.items()
            )
            for what in ("kernels", "waits")
        }
        for phase, units in work.items()
    }
