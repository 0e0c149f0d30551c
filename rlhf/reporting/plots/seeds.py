"""Plots of several runs: a thin curve per run, a thick one for their mean, a band for the mean's interval."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.reporting.plots.style import (
    REWARD_COLOUR,
    SOFT,
    add_legend,
    colour_of,
    label_rows,
    line_of,
    mark_place,
    panel,
    shade_kl_band,
)
from rlhf.reporting.seeds import Summary, t_interval
from rlhf.reporting.values import KL_BAND, NAMES, SMOOTH, Record, running_mean, series

Curve = Mapping[float, float]  # step -> value

Histories = Mapping[str, Sequence[Sequence[Record]]]  # "full" or "lora" -> one metrics.jsonl per run


def curve(rows: Sequence[Record], key: str, width: int = 1) -> dict[float, float]:
    """step -> running mean over width rows of the value under key; of a step logged twice, the last row counts."""
    steps, values = series(rows, key)
    last = dict(zip(steps, values, strict=True))
    return dict(zip(last, running_mean(list(last.values()), width), strict=True))


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float, float, float]]:
    """(step, mean, low, high) with the t interval of the mean, at the steps that all curves have.

    Empty for fewer than two curves.
    """
    if len(curves) < 2:
        return []
    points = []
    for step in sorted(set.intersection(*(set(one) for one in curves))):
        values = [one[step] for one in curves]
        low, high = t_interval(values) or (math.nan, math.nan)
        points.append((step, math.fsum(values) / len(values), low, high))
    return points


def learning(logs: Sequence[Sequence[Record]], key: str) -> Figure:
    """Plot the reward models' validation "loss" or "accuracy" against the optimizer step.

    logs: the rows of one metrics.jsonl per run.
    """
    unit = "mean per validation pair" if key == "loss" else "share of validation pairs"
    figure, axis = panel(f"{key.capitalize()} of the reward models", unit, "optimizer step")
    _draw(axis, [curve(rows, f"eval_{key}") for rows in logs], REWARD_COLOUR, "-", "validation")
    _show_curves(axis)
    add_legend(axis)
    return figure


def scores(histories: Histories) -> Figure:
    """Plot the mean score of a PPO step, as a running mean, against the step."""
    figure, axis = panel("Reward during PPO", f"mean score, running mean over {SMOOTH} steps", "PPO step")
    for name, runs in histories.items():
        look = line_of(name)
        curves = [curve(rows, "objective/scores", SMOOTH) for rows in runs]
        _draw(axis, curves, look["color"], look["linestyle"], look["label"])
    _show_curves(axis)
    add_legend(axis)
    return figure


def kl(histories: Histories) -> Figure:
    """Plot the KL per response token against the PPO step, the target band shaded."""
    figure, axis = panel("KL to the reference", "nats per response token", "PPO step")
    shade_kl_band(axis)
    for name, runs in histories.items():
        look = line_of(name)
        curves = [curve(rows, "objective/kl_per_token") for rows in runs]
        _draw(axis, curves, look["color"], look["linestyle"], look["label"])
    _show_curves(axis, 0.0, KL_BAND[1])
    add_legend(axis)
    return figure


def gains(names: Sequence[str], summaries: Mapping[str, Summary]) -> Figure:
    """Plot each run's gains, full and LoRA joined by a line, and below them the means with intervals; 0 is marked.

    names: the runs' names; summaries: "full" or "lora" -> its gain in these runs.
    """
    labels = [*names, "mean, 95% interval"]
    figure, axis = panel("Gain over the base model", "of each run", "gain in mean reward", 1.6 + 0.42 * len(labels))
    mark_place(axis, 0, len(labels))
    for row in range(len(names)):
        ends = [value for one in summaries.values() if (value := one.values[row]) is not None]
        axis.plot(ends, [row] * len(ends), color=SOFT, linewidth=1.2, zorder=1, label="_run")
    for place, (model, one) in enumerate(summaries.items()):
        colour, marker = colour_of(model), "oD"[place % 2]  # so that they differ in a grey print
        points = [(value, row) for row, value in enumerate(one.values) if value is not None]
        axis.plot(*zip(*points, strict=True), marker, color=colour, markersize=6, label=NAMES.get(model, model))
        below = len(names) + 0.16 * place
        if one.interval:
            axis.plot(one.interval, [below, below], color=colour, linewidth=3, label=f"_{model} interval")
        axis.plot([one.mean], [below], marker, color=colour, markersize=7, label=f"_{model} mean")
    axis.margins(x=0.08)
    label_rows(axis, labels)
    add_legend(axis)
    return figure


def _draw(axis: Axes, curves: Sequence[Curve], colour: str, style: str, label: str) -> None:
    """Draw every curve thin and, at the steps that all have, their mean thick within its interval."""
    curves = [one for one in curves if one]
    points = mean_curve(curves)
    for i, one in enumerate(curves):
        name = f"_{label}" if points or i else label  # the legend shows the mean, if there is one
        steps, values = list(one), list(one.values())
        axis.plot(steps, values, color=colour, linestyle=style, linewidth=0.8, alpha=0.55, label=name)
    if points:
        steps, means, lows, highs = map(list, zip(*points, strict=True))
        axis.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0, label=f"_{label} interval")
        axis.plot(steps, means, color=colour, linestyle=style, linewidth=2.2, label=f"{label}, mean")


def _show_curves(axis: Axes, *also: float) -> None:
    """Limit y to the curves and the values `also`: the interval of two runs can be ten times as wide."""
    values = [float(y) for one in axis.get_lines() for y in np.asarray(one.get_ydata(), float)] + list(also)
    if values:
        margin = 0.3 * (max(values) - min(values)) or 1.0
        axis.set_ylim(min(values) - margin, max(values) + margin)
