"""Plots of the evaluation: gains under both reward models, and score against response length."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rlhf.reporting.plots.style import add_legend, colour_of, label_rows, line_of, mark_place, panel
from rlhf.reporting.values import NAMES, Record, is_number

_FEW = 20  # a line through fewer responses says nothing


def gains(records: Mapping[str, Record], gold: Mapping[str, Record] | None = None, confidence: float = 0.95) -> Figure:
    """Plot each model's gain over the base model with its interval, under both reward models; 0 is marked.

    records: model -> {"gain", "interval": [low, high]} by the reward model that PPO used; gold: the same by the second
    one. Models without a gain are left out.
    """
    rows = []
    for name, record in records.items():
        for judge, found in (("PPO's reward model", record), ("second reward model", (gold or {}).get(name) or {})):
            if is_number(found.get("gain")):
                rows.append((name, judge, found))
    height = max(3.2, 1.15 + 0.5 * len(rows))
    unit = f"each in its reward model's units, bar: {confidence:.0%} interval"
    figure, axis = panel("Gain over the base model", unit, "gain in mean reward", height, legend=False)
    mark_place(axis, 0, len(rows))
    for row, (name, judge, record) in enumerate(rows):
        low, high = record.get("interval") or (record["gain"], record["gain"])
        first = judge.startswith("PPO")
        label = name if first else f"{name} gold"
        # Drawn from end to end: an interval need not be centred on the gain.
        axis.plot(
            [low, high], [row, row], color=colour_of(name), linewidth=3 if first else 1.8, label=f"_{label} interval"
        )
        face: dict[str, Any] = {} if first else {"markerfacecolor": "#ffffff", "markeredgewidth": 1.8}
        axis.plot([record["gain"]], [row], "o", color=colour_of(name), markersize=8, label=label, **face)
    axis.margins(x=0.08)
    label_rows(axis, [f"{NAMES.get(name, name)}, {judge}: {record['gain']:+.3f}" for name, judge, record in rows])
    return figure


def score_against_length(responses: Sequence[Record]) -> Figure:
    """Plot score against response length: one dot per response, one least-squares line per model.

    responses: rows with model, response_length (tokens) and score (reward units).
    """
    figure, axis = panel("Score against length", "score of a response", "response length (tokens)")
    for place, name in enumerate(dict.fromkeys(str(row.get("model")) for row in responses)):
        points = [
            (row["response_length"], row["score"])
            for row in responses
            if row.get("model") == name and is_number(row.get("response_length")) and is_number(row.get("score"))
        ]
        if not points:
            continue
        length, score = [list(values) for values in zip(*points, strict=True)]
        colour, marker = colour_of(name), "osD^"[place % 4]
        large = len(points) > 1000  # as dots of an image: a page is not to hold thousands of them as elements
        axis.scatter(
            length, score, s=12, color=colour, alpha=0.5, marker=marker, linewidth=0, label="_dots", rasterized=large
        )
        if len(points) >= _FEW and len(set(length)) > 2:
            axis.plot(*_line(length, score), **line_of(name) | {"label": f"_{name} line"})
        axis.plot([], [], marker, color=colour, markersize=5, label=NAMES.get(name, name))
    add_legend(axis)
    return figure


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """The ends of the least-squares line over the range of x."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    ends = [min(x), max(x)]
    return ends, [mean_y + slope * (end - mean_x) for end in ends]
