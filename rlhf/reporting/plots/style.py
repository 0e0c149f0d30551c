"""How all plots look, and a plot as SVG for the page and as PNG for the PDF; no files, no pyplot, no global state.

A plot has one panel of a fixed width, so that several stand in a row on a wide page and one fills a phone, with text
of a readable size on both. Colours are Okabe-Ito's, safe for colour-blind readers; series differ in line style or
marker, too, so that a grey print stays readable.
"""

import io
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf.reporting.values import KL_BAND, NAMES

COLOURS = {"base": "#6b6b6b", "full": "#0072b2", "lora": "#d55e00"}
REWARD_COLOUR = "#b8588f"  # the reward model's; no policy has it
GREEN = "#009e73"  # the target band, the best step, and models with no colour of their own
INK, SOFT, GRID, PAPER = "#1d2129", "#5a616d", "#d8dce2", "#ffffff"

# Colour in a plot -> the page's CSS variable, which has another value in dark mode.
_VARIABLES = {
    **{colour: f"--{name}" for name, colour in COLOURS.items()},
    **{REWARD_COLOUR: "--reward", GREEN: "--green", INK: "--ink", SOFT: "--soft", GRID: "--line", PAPER: "--page"},
}
_STYLES = {"full": "-", "lora": "--"}
_DPI = 220
_TEXT, _TITLE = 10.5, 12.0  # points, of a plot 4.2 inches wide
_WIDTH = 4.2
_TOP, _BOTTOM, _LEGEND = 0.62, 0.5, 0.28  # inches for the title, the x axis and the legend
_LEFT, _RIGHT = 0.55, 0.12

_PNGS: WeakKeyDictionary[Figure, bytes] = WeakKeyDictionary()  # of figures that were drawn: PDF and notebook share them


def panel(title: str, unit: str, x: str, height: float = 3.2, legend: bool = True) -> tuple[Figure, Axes]:
    """A figure of one panel: its title, under it the unit of the y axis, and the x axis' label.

    height: inches. legend: whether to leave room for one, which `add_legend` then adds.
    """
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor=PAPER)
    bottom = _BOTTOM + _LEGEND * legend
    place = (_LEFT / _WIDTH, bottom / height, 1 - (_LEFT + _RIGHT) / _WIDTH, 1 - (bottom + _TOP) / height)
    axis = figure.add_axes(place, facecolor="none")
    left = 0.08 / _WIDTH
    figure.text(left, 1 - 0.08 / height, title, size=_TITLE, weight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.32 / height, unit, size=_TEXT, color=SOFT, va="top")
    axis.set_xlabel(x, color=SOFT, size=_TEXT, labelpad=2)
    axis.tick_params(labelsize=_TEXT, labelcolor=SOFT, color=GRID, length=3)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    axis.set_axisbelow(True)
    axis.grid(True, color=GRID, linewidth=0.7)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=x.endswith("step")))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    return figure, axis


def add_legend(axis: Axes) -> None:
    """Put the legend of an axes under it, where it covers no curve."""
    handles, labels = axis.get_legend_handles_labels()
    shown = [pair for pair in zip(handles, labels, strict=True) if not pair[1].startswith("_")]
    if not shown:
        return
    axis.figure.legend(
        [handle for handle, _ in shown],
        [label for _, label in shown],
        loc="lower left",
        bbox_to_anchor=(0.01, 0.0),
        borderaxespad=0.2,
        frameon=False,
        ncols=3,
        fontsize=_TEXT,
        labelcolor=INK,
        handlelength=1.6,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def label_rows(axis: Axes, labels: Sequence[str]) -> None:
    """Name the rows of a plot, row 0 on top, each above its marks at the left: long names need no margin."""
    axis.set_yticks([])
    axis.set_ylim(len(labels) - 0.35, -0.75)
    axis.grid(False)
    axis.spines["left"].set_visible(False)
    for row, label in enumerate(labels):
        # Names are data: a dollar sign in one must not start a formula.
        place: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "va": "bottom", "parse_math": False}
        axis.text(-0.13, row - 0.2, label, size=_TEXT, color=INK, **place)


def shade_kl_band(axis: Axes) -> None:
    """Shade the target band of the KL per token."""
    low, high = KL_BAND
    axis.axhspan(low, high, color=GREEN, alpha=0.16, linewidth=0, label=f"target {low}–{high}")


def mark_place(axis: Axes, x: float, rows: int) -> None:
    """A dotted line at x beside the marks of each row, and not through the rows' names."""
    for row in range(rows):
        axis.plot([x, x], [row - 0.16, row + 0.3], color=SOFT, linestyle=":", linewidth=1.3, label="_place")


def colour_of(name: str) -> str:
    """The colour of a model."""
    return COLOURS.get(name, GREEN)


def line_of(name: str) -> dict[str, Any]:
    """Colour, style and label of a model's curve."""
    style = _STYLES.get(name, "-.")
    return {"color": colour_of(name), "linestyle": style, "linewidth": 1.8, "label": NAMES.get(name, name)}


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes, on white; the same figure gives the same bytes, drawn once."""
    if figure not in _PNGS:
        buffer = io.BytesIO()
        with rc_context({"axes.unicode_minus": False}):  # as in the tables
            FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
        _PNGS[figure] = buffer.getvalue()
    return _PNGS[figure]


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for a page with the CSS variables of head.html.j2, in the page's font.

    name: must differ between the plots of a page, since the ids inside depend on it. Without a title for screen
    readers: the element around it has one.
    """
    buffer = io.StringIO()
    with rc_context({"axes.unicode_minus": False, "svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    head = re.search(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', text)
    if head is None:
        raise ValueError(f"{name}: matplotlib's SVG has no viewBox")
    inside = text[head.end() :]
    inside = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", inside, flags=re.DOTALL)
    inside = re.sub(r" font-family: [^;\"]+;", "", inside)
    used = set(re.findall(r"#(\w+)", inside))
    inside = re.sub(r' id="([^"]+)"', lambda hit: hit[0] if hit[1] in used else "", inside)
    inside = re.sub(r"#[0-9a-f]{6}\b", lambda hit: _colour(hit[0]), inside)
    return f'<svg viewBox="{head[1]}" aria-hidden="true" focusable="false">{inside}'.strip()


def _colour(text: str) -> str:
    return f"var({_VARIABLES[text]})" if text in _VARIABLES else text
