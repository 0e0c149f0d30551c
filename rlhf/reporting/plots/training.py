"""Plots of training: records in, matplotlib Figures out; no files, no pyplot, no global state.

Series differ in colour (Okabe-Ito, safe for colour-blind readers) and in line style, so that a grey print stays
readable.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import linregress

from rlhf.reporting.values import KL_BAND, NAMES, Record, is_number, running_mean, series

COLOURS = {"base": "#6b6b6b", "full": "#0072B2", "lora": "#D55E00"}

_STYLES = {"full": "-", "lora": "--"}

REWARD_COLOUR = "#B8588F"  # the reward model's; no policy has it

_GREEN = "#009E73"  # the target band, the best step, and models with no colour of their own

_INK, _GRID = "#222222", "#dddddd"

_DPI = 160


def learning_curves(rows: Sequence[Record], best_step: int | None = None) -> Figure:
    """Plot loss and accuracy against the optimizer step: training, validation, and the best step if given.

    rows: a Trainer's log history; training under "loss" and "accuracy", validation under "eval_loss", ...
    """
    figure, axes = panels(2)
    for axis, key in zip(axes, ("loss", "accuracy"), strict=True):
        axis.plot(*series(rows, key), color=REWARD_COLOUR, alpha=0.5, linewidth=1, label="training")
        axis.plot(*series(rows, f"eval_{key}"), "o-", color=REWARD_COLOUR, markersize=4, label="validation")
        if best_step is not None:
            label = f"best step ({best_step})"
            axis.axvline(best_step, color=_GREEN, linestyle=":", linewidth=1.5, label=label)
        label_axes(axis, "optimizer step", "loss" if key == "loss" else "accuracy (share of pairs)")
    add_legend(axes[0])
    return figure


def confusion_matrix(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> Figure:
    """Plot a confusion matrix (rows true, columns predicted): each cell's count and its share of the row."""
    figure, (axis,) = panels(1, width=4.2, height=3.4)
    shares = [[count / (sum(row) or 1) for count in row] for row in matrix]
    axis.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            colour = "white" if shares[i][j] > 0.55 else _INK
            axis.text(j, i, f"{count:,}\n{shares[i][j]:.0%}", ha="center", va="center", color=colour)
    # Labels are data: a dollar sign in one must not start a formula.
    axis.set_xticks(range(len(labels)), labels, parse_math=False)
    axis.set_yticks(range(len(labels)), labels, parse_math=False)
    label_axes(axis, "predicted", "true", grid=False)
    return figure


def calibration(bins: Sequence[Record], ece: float | None = None) -> Figure:
    """Plot accuracy against confidence, one point per bin, its area by the number of pairs, and the diagonal."""
    figure, (axis,) = panels(1, width=4.2, height=3.4)
    filled = [row for row in bins if row.get("n", 1)]
    confidence, accuracy = series(filled, "accuracy", x="confidence")
    _, counts = series(filled, "n", x="confidence")
    largest = max(counts, default=1)
    label = f"reward model (ECE {ece:.3f})" if ece is not None else "reward model"
    axis.plot([0, 1], [0, 1], color=COLOURS["base"], linestyle=":", label="perfectly calibrated")
    axis.plot(confidence, accuracy, color=REWARD_COLOUR, linewidth=1, label=label)
    if len(counts) == len(confidence):
        sizes = [20 + 130 * n / largest for n in counts]
        axis.scatter(confidence, accuracy, s=sizes, color=REWARD_COLOUR, alpha=0.8, zorder=3)
    low = min([0.5, *confidence]) - 0.02
    axis.set_xlim(low, 1.02)
    axis.set_ylim(min([low, *(value - 0.05 for value in accuracy)]), 1.05)
    label_axes(axis, "confidence (predicted probability)", "accuracy (share of pairs)")
    add_legend(axis, columns=1)
    return figure


def kl(histories: Mapping[str, Sequence[Record]]) -> Figure:
    """Plot, against the PPO step, the KL to the reference and the coefficient of its penalty.

    Left in nats per response token, the target band shaded; then in nats per response; then the coefficient.
    histories: "full" or "lora" -> the rows of that run's metrics.jsonl.
    """
    figure, axes = panels(3, width=10.4)
    shade_kl_band(axes[0])
    keys = ("objective/kl_per_token", "objective/kl", "objective/kl_coef")
    units = ("KL (nats per response token)", "KL (nats per response)", "KL coefficient")
    for axis, key, unit in zip(axes, keys, units, strict=True):
        for name, rows in histories.items():
            axis.plot(*series(rows, key), **line_of(name))
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))  # the k1 estimate of a KL can fall below 0
        label_axes(axis, "PPO step", unit)
    add_legend(axes[0])
    return figure


def scores_against_kl(histories: Mapping[str, Sequence[Record]]) -> Figure:
    """Plot the mean score against the square root of the KL per response: one dot per step, and the fitted line.

    Bai et al. 2022 (arXiv:2204.05862, section 4.3) find the relation roughly linear. Steps with a negative KL
    estimate are left out.
    """
    figure, (axis,) = panels(1)
    for name, rows in histories.items():
        kl, score = series(
            [row for row in rows if row.get("objective/kl", -1) >= 0], "objective/scores", "objective/kl"
        )
        root = [math.sqrt(value) for value in kl]
        axis.scatter(root, score, s=16, color=colour_of(name), alpha=0.6, label=NAMES.get(name, name))
        if len(set(root)) > 2:
            line = linregress(root, score)
            label = f"{NAMES.get(name, name)}: slope {line.slope:.2f}, r {line.rvalue:.2f}"
            draw_line(axis, line, root, line_of(name) | {"label": label})
    label_axes(axis, "√KL (nats per response)", "mean score (reward units)")
    add_legend(axis, columns=2)
    return figure


def scores(histories: Mapping[str, Sequence[Record]]) -> Figure:
    """Plot the mean score of a PPO step's responses: faint as measured, strong as a running mean."""
    figure, (axis,) = panels(1)
    for name, rows in histories.items():
        steps, values = series(rows, "objective/scores")
        axis.plot(steps, values, color=colour_of(name), linewidth=0.8, alpha=0.4, label="_measured")
        axis.plot(steps, running_mean(values), **line_of(name))
    label_axes(axis, "PPO step", "mean score (reward units)")
    add_legend(axis)
    return figure


def response_shape(histories: Mapping[str, Sequence[Record]]) -> Figure:
    """Plot, against the PPO step, the mean response length in tokens and the share of responses that ended with EOS."""
    figure, axes = panels(2, height=2.6)
    for name, rows in histories.items():
        axes[0].plot(*series(rows, "objective/response_length"), **line_of(name))
        axes[1].plot(*series(rows, "objective/eos_rate"), **line_of(name))
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(-0.03, 1.03)
    label_axes(axes[0], "PPO step", "length (tokens)")
    label_axes(axes[1], "PPO step", "EOS rate (share)")
    add_legend(axes[0])
    return figure


def gains(records: Mapping[str, Record], confidence: float = 0.95) -> Figure:
    """Plot each model's gain in mean reward over the base model with its interval; 0 is marked.

    records: model -> {"gain", "interval": [low, high]}; models without a gain are left out.
    """
    shown = [name for name, record in records.items() if is_number(record.get("gain"))]
    figure, (axis,) = panels(1, height=1.3 + 0.6 * len(shown))
    axis.axvline(0, color=COLOURS["base"], linestyle=":")
    for row, name in enumerate(shown):
        gain = records[name]["gain"]
        low, high = records[name].get("interval") or (gain, gain)
        # Drawn from end to end: an interval need not be centred on the gain.
        axis.plot([low, high], [row, row], color=colour_of(name), linewidth=3, label=f"_{name} interval")
        axis.plot([gain], [row], "o", color=colour_of(name), markersize=9, label=name)
        axis.annotate(f"{gain:+.3f}", (gain, row), (0, 9), textcoords="offset points", ha="center")
    axis.set_yticks(range(len(shown)), [NAMES.get(name, name) for name in shown], parse_math=False)
    axis.set_ylim(len(shown) - 0.4, -0.7)  # the first model on top
    label_axes(axis, f"gain in mean reward over base (reward units), {confidence:.0%} interval", "")
    return figure


def to_png(figure: Figure) -> bytes:
    """Return the figure as a PNG file's bytes; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def panels(columns: int, width: float = 7.6, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure, width by height in inches, with its axes side by side."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def draw_line(axis: Axes, line: Any, x: Sequence[float], style: Mapping[str, Any]) -> None:
    """Draw scipy's `linregress` result over the range of x."""
    ends = [min(x), max(x)]
    axis.plot(ends, [line.intercept + line.slope * end for end in ends], **style)


def shade_kl_band(axis: Axes) -> None:
    """Shade the target band of the KL per token."""
    low, high = KL_BAND
    axis.axhspan(low, high, color=_GREEN, alpha=0.14, linewidth=0, label=f"target band {low}–{high}")


def label_axes(axis: Axes, x: str, y: str, grid: bool = True) -> None:
    """Label the axes, in the style of all plots."""
    axis.set_xlabel(x, color=_INK)
    axis.set_ylabel(y, color=_INK)
    if x.endswith("step"):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(not grid)
    if grid:
        axis.set_axisbelow(True)
        axis.grid(True, color=_GRID, linewidth=0.7)


def add_legend(axis: Axes, columns: int = 3) -> None:
    """Put the legend of an axes above the figure, where it covers no curve."""
    handles, labels = axis.get_legend_handles_labels()
    axis.figure.legend(handles, labels, frameon=False, loc="outside upper left", ncols=columns)


def colour_of(name: str) -> str:
    """The colour of a model."""
    return COLOURS.get(name, _GREEN)


def line_of(name: str) -> dict[str, Any]:
    """Colour, style and label of a model's curve."""
    style = _STYLES.get(name, "-.")
    return {"color": colour_of(name), "linestyle": style, "linewidth": 1.8, "label": NAMES.get(name, name)}
