"""Numbers from logged rows, and the names of the models: what the report's words and plots share."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

Record = Mapping[str, Any]

KL_BAND = (0.02, 0.1)  # target of objective/kl_per_token, nats per response token

NAMES = {"base": "base", "full": "full", "lora": "LoRA"}

SMOOTH = 10  # PPO steps in the running mean of a noisy curve


def series(rows: Sequence[Record], y: str, x: str = "step") -> tuple[list[float], list[float]]:
    """Return the points (xs, ys) of the rows that hold finite numbers under both keys, in the rows' order."""
    points = [(row[x], row[y]) for row in rows if is_number(row.get(x)) and is_number(row.get(y))]
    return [float(a) for a, _ in points], [float(b) for _, b in points]


def is_number(value: object) -> TypeGuard[float]:
    """Whether value is a finite number; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def running_mean(values: Sequence[float], width: int = SMOOTH) -> list[float]:
    """Return the mean of each value and up to width - 1 before it; the result has the length of values."""
    windows = [values[max(0, i - width + 1) : i + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]


def share_inside(values: Sequence[float], band: tuple[float, float] = KL_BAND) -> float:
    """Return the share, 0 to 1, of values inside band, ends included; nan for no values."""
    return sum(band[0] <= value <= band[1] for value in values) / len(values) if values else math.nan
