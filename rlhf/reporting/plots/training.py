"""Plots of training: records in, matplotlib Figures out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.reporting.plots.style import (
    GREEN,
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
from rlhf.reporting.values import NAMES, SMOOTH, Record, is_number, running_mean, series

Histories = Mapping[str, Sequence[Record]]  # "full" or "lora" -> the rows of that run's metrics.jsonl

_FEW = 20  # from so many points on, a curve is smoothed and has no dots


def reward_loss(rows: Sequence[Record], best_step: int | None = None) -> Figure:
    """Plot the reward model's loss against the optimizer step: training, validation, and the best step if given.

    rows: a Trainer's log history; training under "loss", validation under "eval_loss".
    """
    return _learning(rows, "loss", "Loss of the reward model", "mean per pair", best_step)


def reward_accuracy(rows: Sequence[Record], best_step: int | None = None) -> Figure:
    """Plot the reward model's accuracy against the optimizer step, as `reward_loss` does the loss."""
    return _learning(rows, "accuracy", "Accuracy of the reward model", "share of pairs", best_step)


def _learning(rows: Sequence[Record], key: str, title: str, unit: str, best_step: int | None) -> Figure:
    figure, axis = panel(title, unit, "optimizer step")
    if best_step is not None:
        axis.axvline(best_step, color=GREEN, linestyle=":", linewidth=1.5, label=f"best step ({best_step})")
    axis.plot(*series(rows, key), color=REWARD_COLOUR, alpha=0.55, linewidth=1.2, label="training")
    axis.plot(*series(rows, f"eval_{key}"), "o-", color=REWARD_COLOUR, markersize=4, label="validation")
    add_legend(axis)
    return figure


def accuracies(rows: Sequence[tuple[str, Record]]) -> Figure:
    """Plot accuracies with their intervals, one row each: (name, {"accuracy", "interval"}); 50 % is marked."""
    shown = [(name, row) for name, row in rows if is_number(row.get("accuracy"))]
    height = max(3.2, 1.15 + 0.4 * len(shown))
    figure, axis = panel("Where the reward model is right", "share of pairs", "accuracy", height, legend=False)
    mark_place(axis, 0.5, len(shown))
    for row, (name, record) in enumerate(shown):
        colour = SOFT if name.startswith("rule: ") else REWARD_COLOUR
        low, high = record.get("interval") or (record["accuracy"], record["accuracy"])
        axis.plot([low, high], [row, row], color=colour, linewidth=2.5, label=f"_{name} interval")
        axis.plot([record["accuracy"]], [row], "o", color=colour, markersize=6, label=f"_{name}")
    axis.set_xlim(-0.02, 1.02)
    label_rows(axis, [f"{name}: {record['accuracy']:.1%}" for name, record in shown])
    return figure


def calibration(bins: Sequence[Record], ece: float | None = None) -> Figure:
    """Plot accuracy against confidence, one point per bin, its area by the number of pairs, and the diagonal."""
    filled = [row for row in bins if row.get("n", 1)]
    confidence, accuracy = series(filled, "accuracy", x="confidence")
    _, counts = series(filled, "n", x="confidence")
    largest = max(counts, default=1)
    unit = "accuracy (share of pairs)" + (f", ECE {ece:.3f}" if ece is not None else "")
    figure, axis = panel("Calibration of the reward model", unit, "confidence (predicted probability)")
    axis.plot([0, 1], [0, 1], color=SOFT, linestyle=":", label="perfectly calibrated")
    axis.plot(confidence, accuracy, color=REWARD_COLOUR, linewidth=1, label="reward model")
    if len(counts) == len(confidence):
        sizes = [15 + 110 * n / largest for n in counts]
        axis.scatter(confidence, accuracy, s=sizes, color=REWARD_COLOUR, alpha=0.8, linewidth=0, zorder=3)
    low = min([0.5, *confidence]) - 0.02
    axis.set_xlim(low, 1.02)
    axis.set_ylim(min([low, *(value - 0.05 for value in accuracy)]), 1.05)
    add_legend(axis)
    return figure


def scores(histories: Histories) -> Figure:
    """Plot the mean score of a PPO step's responses within its standard error; of many steps, a running mean on top."""
    figure, axis = panel("Reward during PPO", "mean score of the sampled responses", "PPO step")
    for name, rows in histories.items():
        steps, values = series(rows, "objective/scores")
        look = line_of(name)
        low, high = _error_band(rows, steps, values)
        if low:
            axis.fill_between(steps, low, high, color=colour_of(name), alpha=0.15, linewidth=0, label=f"_{name} error")
        if len(values) < _FEW:
            axis.plot(steps, values, marker="o", markersize=4, **look)
        else:
            axis.plot(steps, values, color=colour_of(name), linewidth=0.8, alpha=0.4, label="_measured")
            axis.plot(steps, running_mean(values, SMOOTH), **look)
    add_legend(axis)
    return figure


def _error_band(rows: Sequence[Record], steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Each mean score less and plus its standard error; empty if the rows do not say the spread and the batch."""
    found, spreads = series(rows, "objective/scores_std")
    places, episodes = series(rows, "episode")
    if not found == places == steps or not all(steps):
        return [], []
    errors = [s / math.sqrt(max(1.0, e / step)) for s, e, step in zip(spreads, episodes, steps, strict=True)]
    pairs = list(zip(values, errors, strict=True))
    return [v - e for v, e in pairs], [v + e for v, e in pairs]


def kl(histories: Histories) -> Figure:
    """Plot the KL to the reference per response token against the PPO step, the target band shaded."""
    figure, axis = panel("KL to the reference", "nats per response token", "PPO step")
    shade_kl_band(axis)
    _curves(axis, histories, "objective/kl_per_token")
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))  # the k1 estimate of a KL can fall below 0
    add_legend(axis)
    return figure


# Further curves of PPO: name of the plot -> key of metrics.jsonl, title, unit. One that never changes is not drawn.
CURVES = {
    "ppo_length": ("objective/response_length", "Response length", "mean tokens"),
    "ppo_eos": ("objective/eos_rate", "Responses that end by themselves", "share of a step's responses"),
    "ppo_entropy": ("policy/entropy_avg", "Entropy of the policy", "nats per response token"),
    "ppo_critic": ("value/explained_variance", "How well the critic predicts", "explained variance of returns"),
    "ppo_kl_coef": ("objective/kl_coef", "Coefficient of the KL penalty", "reward units per nat"),
}


def curve(histories: Histories, name: str) -> Figure | None:
    """Plot a curve of CURVES against the PPO step; None if no run has values that change."""
    key, title, unit = CURVES[name]
    if not any(len(set(series(rows, key)[1])) > 1 for rows in histories.values()):
        return None
    figure, axis = panel(title, unit, "PPO step")
    _curves(axis, histories, key)
    if name == "ppo_eos":
        axis.set_ylim(-0.03, 1.03)
    elif name == "ppo_length":
        axis.set_ylim(bottom=0)
    add_legend(axis)
    return figure


def _curves(axis: Axes, histories: Histories, key: str) -> None:
    for name, rows in histories.items():
        steps, values = series(rows, key)
        dots: dict[str, Any] = {"marker": "o", "markersize": 4} if len(values) < _FEW else {}
        axis.plot(steps, values, **line_of(name), **dots)


def scores_against_kl(histories: Histories) -> Figure:
    """Plot the mean score against the square root of the KL per response: one dot per step, later ones darker.

    Bai et al. 2022 (arXiv:2204.05862, section 4.3) find the relation roughly linear. Steps with a negative KL
    estimate are left out.
    """
    figure, axis = panel("Reward bought with KL", "mean score of a PPO step", "√KL (nats per response)")
    for name, rows in histories.items():
        there = [row for row in rows if row.get("objective/kl", -1) >= 0]
        kl, score = series(there, "objective/scores", "objective/kl")
        root = [math.sqrt(value) for value in kl]
        if not root:
            continue
        shades: Any = [0.25 + 0.65 * (i + 1) / len(root) for i in range(len(root))]
        marker = "o" if name == "full" else "D"
        colour, label = colour_of(name), NAMES.get(name, name)
        axis.scatter(root, score, s=18, color=colour, alpha=shades, marker=marker, linewidth=0, label=f"_{name}")
        axis.plot([], [], marker, color=colour, markersize=5, label=label)
    add_legend(axis)
    return figure
