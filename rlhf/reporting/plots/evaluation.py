"""Plots that check whether a gain is real: the second reward model, and response length."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import linregress

from rlhf.reporting.plots.training import (
    COLOURS,
    add_legend,
    colour_of,
    draw_line,
    label_axes,
    line_of,
    panels,
)
from rlhf.reporting.values import NAMES, Record, is_number


def proxy_and_gold(validity: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plot each model's gain under the reward model that PPO used and under the second one, side by side.

    Each in standard deviations of its scores of the base model's responses. validity: model -> the record of
    evaluation.json, with "proxy_in_sd" and "gold"; models without them are left out.
    """
    shown = {
        name: (record["proxy_in_sd"], record["gold"]["in_sd"])
        for name, record in validity.items()
        if is_number(record.get("proxy_in_sd")) and is_number(record.get("gold", {}).get("in_sd"))
    }
    figure, (axis,) = panels(1, height=1.3 + 0.6 * len(shown))
    axis.axvline(0, color=COLOURS["base"], linestyle=":")
    for row, (name, values) in enumerate(shown.items()):
        for shift, value, kind, shade in ((-0.18, values[0], "proxy", 1.0), (0.18, values[1], "gold", 0.45)):
            axis.barh(row + shift, value, height=0.32, color=colour_of(name), alpha=shade)
            side = 4 if value >= 0 else -4
            text = f"{kind} {value:+.2f}"
            place = "left" if value >= 0 else "right"
            axis.annotate(text, (value, row + shift), (side, 0), textcoords="offset points", ha=place, va="center")
    axis.margins(x=0.25)
    axis.set_yticks(range(len(shown)), [NAMES.get(name, name) for name in shown], parse_math=False)
    axis.set_ylim(len(shown) - 0.4, -0.6)  # the first model on top
    label_axes(axis, "gain over base (standard deviations of the base's scores)", "")
    return figure


def score_against_length(responses: Sequence[Record]) -> Figure:
    """Plot score against response length: one dot per response, one fitted line per model.

    responses: rows with model, response_length (tokens) and score (reward units).
    """
    figure, (axis,) = panels(1)
    for name in dict.fromkeys(str(row.get("model")) for row in responses):
        points = [
            (row["response_length"], row["score"])
            for row in responses
            if row.get("model") == name and is_number(row.get("response_length")) and is_number(row.get("score"))
        ]
        if not points:
            continue
        length, score = [list(values) for values in zip(*points, strict=True)]
        axis.scatter(length, score, s=14, color=colour_of(name), alpha=0.5, linewidth=0, label="_dots")
        style = line_of(name)
        if len(set(length)) > 2:
            draw_line(axis, linregress(length, score), length, style)
        else:
            axis.plot([], [], **style)
    label_axes(axis, "response length (tokens)", "score (reward units)")
    add_legend(axis)
    return figure
