"""The report as a PDF: the headings, texts, tables and plots of the HTML page, one after another.

It knows the elements that report.html.j2 uses: headings, paragraphs, lists, tables with a caption, plots, samples.
Text that the page folds away is shown, and what has the class `screen` is left out. A table that fits on a page is
not broken over two.
"""

import io
import logging
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fpdf import FPDF
from fpdf.enums import MethodReturnValue
from fpdf.fonts import TTFFont
from matplotlib import get_data_path

from rlhf.reporting.plots.style import COLOURS
from rlhf.reporting.values import NAMES

_TEXT_TAGS = {"h1", "h2", "h3", "h4", "p", "li", "figcaption", "caption", "th", "td", "summary"}
_SKIPPED = {"style", "title", "script", "svg", "nav"}
_VOID = {"meta", "img", "br", "hr", "link", "input"}
_SIZES = {"h1": 17.0, "h2": 13.0, "summary": 11.0, "h3": 10.0, "h4": 9.0}  # points
_BODY, _SMALL, _CELL = 9.0, 7.5, 7.5
_INK, _SOFT, _LINE = (29, 33, 41), (90, 97, 109), (216, 220, 226)
_COLOURS: dict[str, Any] = {NAMES[model]: colour for model, colour in COLOURS.items()}  # of the line over a response
_MARGIN = 16.0  # mm at the bottom of a page
_GAP = 6.0  # mm between plots side by side
_SHAPED = {"Arabic", "Hebrew", "Syriac", "Thaana", "Nko"}  # in the font, but their letters change places and forms
_PAD = 0.8  # mm in a table's cell, above and below


@dataclass
class Cell:
    """A table cell."""

    text: str = ""
    number: bool = False


@dataclass
class Block:
    """A heading, text, table or plot; `kind` is the element's name."""

    kind: str
    text: str = ""
    names: frozenset[str] = frozenset()  # the element's classes
    plot: str = ""  # a figure's plot, its caption in `text`
    table: list[list[Cell]] = field(default_factory=list)
    heads: int = 0  # heading rows of the table
    measured: tuple[list[float], list[float], float] | None = None
    parts: list["Block"] = field(default_factory=list)  # of a sample: its prompt, then each model and its response


class _Page(HTMLParser):
    """The blocks of the report's page, in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._outer = self.blocks
        self._open: list[str] = []
        self._text: list[str] = []
        self._names: frozenset[str] = frozenset()
        self._table: Block | None = None
        self._plot = ""
        self._left_out: list[str] = []  # open elements from one on that is not for a PDF
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            return
        attributes = {name: value or "" for name, value in attrs}
        names = frozenset(attributes.get("class", "").split())
        if self._left_out or tag in _SKIPPED or "screen" in names:
            self._left_out.append(tag)
            return
        if tag == "table":
            self._table = Block("table", names=names)
        elif tag == "tr" and self._table:
            self._table.table.append([])
        elif tag == "figure":
            self._plot = attributes.get("data-plot", "")
        elif tag == "article":
            self._outer, self.blocks = self.blocks, []
        if tag in _TEXT_TAGS:
            self._open.append(tag)
            self._text, self._names = [], names

    def handle_data(self, data: str) -> None:
        if self._open and not self._left_out:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if self._left_out:
            if tag in self._left_out:
                del self._left_out[len(self._left_out) - 1 - self._left_out[::-1].index(tag) :]
            return
        if tag == "table" and self._table:
            self.blocks.append(self._table)
            self._table = None
        elif tag == "article":
            self._outer.append(Block("sample", parts=self.blocks))
            self.blocks = self._outer
        elif tag == "thead" and self._table:
            self._table.heads = len(self._table.table)
        if not self._open or self._open[-1] != tag:
            return
        self._open.pop()
        shown = "text" in self._names  # keep line breaks, as on the page
        text = "".join(self._text).strip("\n") if shown else " ".join("".join(self._text).split())
        if tag in ("th", "td") and self._table:
            self._table.table[-1].append(Cell(text, number="n" in self._names))
        elif tag == "caption" and self._table:
            self._table.text = text
        elif tag == "figcaption" and self._plot:
            self.blocks.append(Block("figure", text, plot=self._plot))
        elif text:
            self.blocks.append(Block(tag, text, names=self._names))


class _Document(FPDF):
    def __init__(self, title: str) -> None:
        super().__init__(format="A4")
        fonts = Path(get_data_path()) / "fonts" / "ttf"
        self.add_font("sans", "", fonts / "DejaVuSans.ttf")
        self.add_font("sans", "B", fonts / "DejaVuSans-Bold.ttf")
        self.set_title(title)
        self.set_lang("en")
        self.set_margin(15)
        self.set_auto_page_break(True, margin=_MARGIN)
        self.set_font("sans", size=_BODY)

    def footer(self) -> None:
        self.set_y(-11)
        self.set_font("sans", size=_SMALL)
        self.set_text_color(*_SOFT)
        self.cell(0, 5, f"{self.title}, page {self.page_no()} of {{nb}}", align="C")

    def room(self) -> float:
        """Millimetres that are left on the page."""
        return self.page_break_trigger - self.get_y()

    def keep(self, height: float) -> None:
        """Start a page if so many millimetres do not fit on this one but would on another."""
        if self.room() < height < self.page_break_trigger - self.t_margin:
            self.add_page()

    def knows(self, character: str) -> bool:
        """Whether the font has a glyph for it."""
        font = self.fonts["sans"]
        return character.isspace() or not isinstance(font, TTFFont) or ord(character) in font.cmap


def to_pdf(html: str, images: Mapping[str, bytes]) -> bytes:
    """The report's HTML page as the bytes of a PDF. images: plot name -> PNG."""
    blocks = _Page(html).blocks
    title = next((block.text for block in blocks if block.kind == "h1"), "Report")
    pdf = _Document(title)
    pdf.add_page()
    missing = _missing(pdf, html)
    while blocks:
        block = blocks.pop(0)
        if missing and block.kind != "h1" and "author" not in block.names:
            _paragraph(pdf, Block("p", missing, frozenset({"how"})))
            missing = ""
        if block.kind == "figure":
            row = [block]
            if blocks and blocks[0].kind == "figure":
                row.append(blocks.pop(0))
            _plots(pdf, row, images)
        elif block.kind in _SIZES:
            _heading(pdf, block, blocks)
        elif block.kind == "table":
            _table(pdf, block)
        elif block.kind == "sample":
            _sample(pdf, block.parts)
        else:
            _paragraph(pdf, block)
    logging.getLogger("fpdf.output").setLevel(logging.ERROR)  # it names the letters that `missing` names
    return bytes(pdf.output())


def _missing(pdf: _Document, html: str) -> str:
    """A line on the letters that this PDF does not show, or not as they are written; empty if it shows all."""
    letters = sorted({letter for letter in html if ord(letter) > 127})
    unknown = [letter for letter in letters if not pdf.knows(letter)]
    unjoined = {_script(letter) for letter in letters if pdf.knows(letter)} & _SHAPED
    lines = []
    if unknown:
        scripts = ", ".join(dict.fromkeys(map(_script, unknown)))
        codes = ", ".join(f"U+{ord(letter):04X}" for letter in unknown[:5])
        lines.append(
            f"{len(unknown):,} characters of this report ({scripts}), such as {codes}, are not in this PDF's font and "
            "show as boxes."
        )
    if unjoined:
        lines.append(f"Letters in {', '.join(sorted(unjoined))} are not joined or put in order.")
    return " ".join([*lines, "The HTML page shows them."]) if lines else ""


def _script(letter: str) -> str:
    """The name of a letter's script, as the first word of its Unicode name has it."""
    name = unicodedata.name(letter, "other").partition(" ")[0].partition("-")[0]
    return {"CJK": "Chinese"}.get(name, name.capitalize())


def _heading(pdf: _Document, block: Block, following: Sequence[Block]) -> None:
    """A heading, on the page of what follows it."""
    size = _SIZES[block.kind]
    pdf.keep(size * 0.8 + _beginning(pdf, following))
    pdf.set_font("sans", "B", size)
    pdf.set_text_color(*_INK)
    if block.kind in ("h1", "h2"):
        pdf.start_section(block.text[:80], level=int(block.kind[1]) - 1, strict=False)
    pdf.ln(size / 4 if pdf.get_y() > pdf.t_margin + 1 else 0)
    pdf.multi_cell(0, size / 2, block.text, align="L", new_x="LMARGIN", new_y="NEXT")
    pdf.ln(1)


def _beginning(pdf: _Document, blocks: Sequence[Block]) -> float:
    """Millimetres that the first of these blocks needs to stand on a page, with its own heading if it is one."""
    if not blocks:
        return 0.0
    first = blocks[0]
    if first.kind in _SIZES:
        return _SIZES[first.kind] * 0.8 + _beginning(pdf, blocks[1:])
    if first.kind == "table":
        height = sum(_measure(pdf, first)[1]) + 9
        return height if height < pdf.page_break_trigger - pdf.t_margin - 20 else 40.0
    return {"figure": 80.0, "sample": 35.0}.get(first.kind, 12.0)


def _paragraph(pdf: _Document, block: Block) -> None:
    soft = bool(block.names & {"how", "author"})
    size = _SMALL if soft else _BODY
    style = ""
    if "verdict" in block.names:
        size, style = 11.5, "B"
    elif "prompt" in block.names:
        style = "B"
    pdf.set_font("sans", style, size)
    pdf.set_text_color(*(_SOFT if soft else _INK))
    text = f"• {block.text}" if block.kind == "li" else block.text
    pdf.keep(min(_height(pdf, text, pdf.epw, size / 2), 60.0))  # a short text is not broken over two pages
    pdf.multi_cell(0, size / 2, text, align="L", new_x="LMARGIN", new_y="NEXT")
    pdf.ln(1 if block.kind == "li" else 1.5)


def _plots(pdf: _Document, row: Sequence[Block], images: Mapping[str, bytes]) -> None:
    """One plot, or two side by side, each with its caption under it."""
    width = (pdf.epw - _GAP) / 2
    sizes = [pdf.preload_image(io.BytesIO(images[block.plot]))[2] for block in row]
    heights = [width * float(size["h"]) / float(size["w"]) for size in sizes]  # type: ignore[arg-type]
    pdf.set_font("sans", size=_SMALL)
    line = _SMALL / 2
    below = [_height(pdf, block.text, width, line) for block in row]
    total = max(heights) + max(below) + 2
    pdf.keep(total)
    top = pdf.get_y()
    pdf.set_text_color(*_SOFT)
    for place, (block, height) in enumerate(zip(row, heights, strict=True)):
        x = pdf.l_margin + place * (width + _GAP)
        pdf.image(io.BytesIO(images[block.plot]), x=x, y=top, w=width, h=height, alt_text=block.text)
        pdf.set_xy(x, top + max(heights) + 0.5)
        pdf.multi_cell(width, line, block.text, align="L")
    pdf.set_xy(pdf.l_margin, top + total + 1.5)


def _sample(pdf: _Document, parts: Sequence[Block]) -> None:
    """A prompt, and under it the responses side by side, if they fit on a page; otherwise one after another."""
    about = [part for part in parts if part.kind == "h3" or "prompt" in part.names]
    answers = [part for part in parts if part not in about]
    columns = [answers[i : i + 2] for i in range(0, len(answers), 2)]
    width = (pdf.epw - _PAD * 4 * (len(columns) - 1)) / max(1, len(columns))
    line = _CELL / 2
    pdf.set_font("sans", size=_CELL)
    tallest = max((_height(pdf, column[-1].text, width, line) for column in columns), default=0.0)
    asked = sum(_height(pdf, part.text, pdf.epw, _BODY / 2) for part in about)
    whole = asked + tallest + 8
    pdf.keep(whole)
    for part in about:
        _paragraph(pdf, Block("p", part.text, part.names if "prompt" in part.names else frozenset({"how"})))
    if whole > pdf.page_break_trigger - pdf.t_margin:
        for part in answers:
            _paragraph(pdf, Block("p", part.text, frozenset({"prompt"}) if part.kind == "h4" else frozenset()))
        return
    top = pdf.get_y()
    for place, column in enumerate(columns):
        x = pdf.l_margin + place * (width + 4 * _PAD)
        pdf.set_draw_color(_COLOURS.get(column[0].text.partition(" ")[0], _LINE))
        pdf.set_line_width(0.6)
        pdf.line(x, top, x + width, top)
        pdf.set_line_width(0.2)
        pdf.set_xy(x, top + _PAD)
        for part in column:
            pdf.set_x(x)
            pdf.set_font("sans", "B" if part.kind == "h4" else "", _CELL)
            pdf.set_text_color(*_INK)
            pdf.multi_cell(width, line, part.text, align="L", new_x="LEFT", new_y="NEXT")
    pdf.set_xy(pdf.l_margin, top + line + tallest + 4)


def _measure(pdf: _Document, block: Block) -> tuple[list[float], list[float], float]:
    """Widths of a table's columns and heights of its rows, mm, and the size of its font; measured once."""
    if block.measured is not None:
        return block.measured
    columns = max(map(len, block.table))
    size = _CELL if columns < 8 else _CELL - 0.8
    pdf.set_font("sans", "B", size)
    widths, heights = _widths(pdf, block, columns), []
    for number, row in enumerate(block.table):
        pdf.set_font("sans", "B" if number < block.heads else "", size)
        lines = (_height(pdf, cell.text, width, size / 2) for cell, width in zip(row, widths, strict=False))
        heights.append(max(lines, default=size / 2) + 2 * _PAD)
    block.measured = widths, heights, size
    return block.measured


def _table(pdf: _Document, block: Block) -> None:
    """A table with lines under its rows; one that fits on a page is not broken over two."""
    widths, heights, size = _measure(pdf, block)
    line = size / 2
    pdf.keep(sum(heights) + 9)
    pdf.set_font("sans", "B", _CELL + 0.5)
    pdf.set_text_color(*_INK)
    pdf.ln(1.5)
    pdf.multi_cell(0, 4.5, block.text, align="L", new_x="LMARGIN", new_y="NEXT")
    head = list(zip(block.table[: block.heads], heights, strict=False))
    for number, (row, height) in enumerate(zip(block.table, heights, strict=True)):
        if height > pdf.room():
            pdf.add_page()
            if number >= block.heads:  # a long table goes on under its heads
                for head_row, head_height in head:
                    _row(pdf, head_row, widths, head_height, line, size, head=True)
        _row(pdf, row, widths, height, line, size, head=number < block.heads)
    pdf.ln(1.5)


def _row(
    pdf: _Document, row: Sequence[Cell], widths: Sequence[float], height: float, line: float, size: float, head: bool
) -> None:
    top, x = pdf.get_y(), pdf.l_margin
    pdf.set_font("sans", "B" if head else "", size)
    pdf.set_text_color(*(_SOFT if head else _INK))
    with _unbroken(pdf):
        for cell, width in zip(row, widths, strict=False):
            pdf.set_xy(x, top + _PAD)
            align = "R" if cell.number else "L"
            if _one_line(pdf, cell.text, width):
                pdf.cell(width, line, cell.text, align=align)  # much faster
            else:
                pdf.multi_cell(width, line, cell.text, align=align)
            x += width
    pdf.set_draw_color(*_LINE)
    bottom = min(top + height, pdf.page_break_trigger)
    pdf.line(pdf.l_margin, bottom, pdf.l_margin + sum(widths), bottom)
    pdf.set_xy(pdf.l_margin, bottom)


@contextmanager
def _unbroken(pdf: _Document) -> Iterator[None]:
    """No page break inside: the row was measured before. One that is taller than a page is cut at the page's end."""
    pdf.set_auto_page_break(False)
    try:
        yield
    finally:
        pdf.set_auto_page_break(True, margin=_MARGIN)


def _one_line(pdf: _Document, text: str, width: float) -> bool:
    return "\n" not in text and float(pdf.get_string_width(text)) < width - 2 * float(pdf.c_margin) - 0.1


def _height(pdf: _Document, text: str, width: float, line: float) -> float:
    if _one_line(pdf, text, width):
        return line
    found = pdf.multi_cell(width, line, text, align="L", dry_run=True, output=MethodReturnValue.HEIGHT)
    return found if isinstance(found, float) else line


def _widths(pdf: _Document, block: Block, columns: int) -> list[float]:
    """Column widths in mm: wide enough for each column's longest word; what is left goes to long texts."""
    padding = 2 * pdf.c_margin + 1
    least, wanted = [4.0] * columns, [4.0] * columns
    for row in block.table:
        for place, cell in enumerate(row):
            words = [pdf.get_string_width(word) for word in cell.text.split()] or [0.0]
            whole = pdf.get_string_width(cell.text)
            least[place] = max(least[place], min(max(words), 45.0) + padding)
            wanted[place] = max(wanted[place], min(whole, 70.0) + padding)
    wanted = [max(pair) for pair in zip(least, wanted, strict=True)]
    if sum(wanted) <= pdf.epw:
        return wanted
    if sum(least) >= pdf.epw:
        return [width * pdf.epw / sum(least) for width in least]
    share = (pdf.epw - sum(least)) / (sum(wanted) - sum(least))
    return [low + (high - low) * share for low, high in zip(least, wanted, strict=True)]
