"""How time and memory of a PPO step grow with one size at a time, and the exponents of the growth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.benchmark.compare import run_side, seconds

# The fixed sizes: batch 16, one PPO epoch, responses of at most 128 tokens (half of that on average).
_BASE = {"batch": 16, "micro": 16, "n_ppo_epochs": 1}


@dataclass(frozen=True)
class Sizes:
    """The sizes to measure, one series for each: rows, tokens, width of the model, rank of LoRA's adapters."""

    batch: tuple[int, ...]
    response: tuple[int, ...]
    width: tuple[int, ...]
    rank: tuple[int, ...]
    head: int  # width of an attention head


SIZES = {
    "seed": Sizes((8, 32, 128, 256), (32, 128, 512, 1024), (128, 256, 512, 768), (1, 8, 64), head=64),
    "tiny": Sizes((8, 32), (16, 64), (32, 128), (1, 16), head=16),  # to see that it works: one or two minutes
}


def series_of(sizes: Sizes) -> dict[str, tuple[str, list[tuple[int, dict[str, Any]]]]]:
    """Name of a series -> its work, and each value with what it changes in the work."""

    def response(n: int) -> dict[str, Any]:
        return {"change": _BASE | {"response": n, "mean_response": n // 2, "positions": 2048}}

    return {
        "batch (rows)": ("ppo_full", [(n, {"change": _BASE | {"batch": n, "micro": 8}}) for n in sizes.batch]),
        "response (most tokens)": ("ppo_full", [(n, response(n)) for n in sizes.response]),
        "width of the model": (
            "ppo_full",
            [(n, {"change": _BASE | {"width": n, "heads": n // sizes.head}}) for n in sizes.width],
        ),
        "LoRA rank": ("ppo_lora", [(n, {"change": _BASE, "rank": n}) for n in sizes.rank]),
    }


def growth(shape: str, precision: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One series per size: values, seconds per step, MiB on top of models and libraries, and both exponents.

    shape: one of SIZES; say: called with a line after each of the runs, which take seconds to a minute.
    """
    found, series = [], series_of(SIZES[shape])
    runs, done = sum(len(points) for _, points in series.values()), 0
    for name, (work, points) in series.items():
        rows = []
        for value, more in points:
            given = {"shape": shape, "work": work, "steps": 3, "precision": precision} | more
            result = run_side("rlhf", given, None)
            rows.append((value, seconds(result), (result["memory_peak"] - result["memory_before"]) / 2**20))
            done += 1
            say(f"[{done}/{runs}] {name} {value:g}: {rows[-1][1]:.2f} s, {rows[-1][2]:.0f} MiB")
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
