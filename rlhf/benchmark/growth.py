"""How time and memory of a PPO step grow with one size at a time, and the exponents of the growth."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.benchmark.compare import run_side, seconds

# The fixed sizes: batch 16, one PPO epoch, responses of at most 128 tokens (half of that on average).
_BASE = {"batch": 16, "micro": 16, "n_ppo_epochs": 1}
_SERIES: dict[str, tuple[str, list[tuple[float, dict[str, Any]]]]] = {
    "batch (rows)": ("ppo_full", [(n, {"change": _BASE | {"batch": n, "micro": 8}}) for n in (8, 32, 128, 256)]),
    "response (most tokens)": (
        "ppo_full",
        [
            (n, {"change": _BASE | {"response": n, "mean_response": n // 2, "positions": 2048}})
            for n in (32, 128, 512, 1024)
        ],
    ),
    "width of the model": (
        "ppo_full",
        [(n, {"change": _BASE | {"width": n, "heads": n // 64}}) for n in (128, 256, 512, 768)],
    ),
    "LoRA rank": ("ppo_lora", [(n, {"change": _BASE, "rank": n}) for n in (1, 8, 64)]),
}


def growth(precision: str) -> list[dict[str, Any]]:
    """One series per size: values, seconds per step, MiB on top of models and libraries, and both exponents."""
    found = []
    for name, (work, points) in _SERIES.items():
        rows = []
        for value, more in points:
            given = {"shape": "seed", "work": work, "steps": 3, "precision": precision} | more
            result = run_side("rlhf", given, None)
            rows.append((value, seconds(result), (result["memory_peak"] - result["memory_before"]) / 2**20))
        values, times, memory = (list(column) for column in zip(*rows, strict=True))
        exponents = {"time": exponent(values, times), "memory": exponent(values, memory)}
        found.append({"name": name, "values": values, "seconds": times, "mib": memory, "exponents": exponents})
    return found


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The k of y = c * x^k, by least squares on logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def growth_table(found: Sequence[dict[str, Any]]) -> str:
    """The result of `growth` as text."""
    lines = []
    for one in found:
        points = (
            f"{value:g}: {time:.2f} s, {memory:.0f} MiB"
            for value, time, memory in zip(one["values"], one["seconds"], one["mib"], strict=True)
        )
        of = one["exponents"]
        lines.append(f"{one['name']}: {'; '.join(points)}; time ~ x^{of['time']:.2f}, memory ~ x^{of['memory']:.2f}")
    return "\n".join(lines)
