"""The report as a PDF: the headings, texts, tables and plots of the HTML page, one after another.

It knows the elements that report.html.j2 uses: headings, paragraphs, lists, tables with a caption, figures. Text that
the page folds away is shown.
"""

import base64
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
from fpdf import FPDF
from fpdf.fonts import FontFace

from rlhf.storage.run_folder import write_bytes

_TEXT_TAGS = {"h1", "h2", "h3", "h4", "p", "pre", "li", "figcaption", "caption", "th", "td"}
_SKIPPED = {"style", "title", "script"}
_SIZES = {"h1": 18.0, "h2": 14.0, "h3": 11.0, "h4": 10.0}
_BODY, _SMALL, _CELL = 9.0, 7.5, 7.5  # points
_INK, _SOFT = (29, 33, 41), (90, 97, 109)
_NARROW = 8  # tables with fewer columns have the larger font


@dataclass
class Cell:
    """A table cell, and how many columns and rows it spans."""

    text: str = ""
    columns: int = 1
    rows: int = 1
    head: bool = False
    number: bool = False


@dataclass
class Block:
    """A heading, text, figure or table; `kind` is the element's name."""

    kind: str
    text: str = ""
    soft: bool = False  # explanations and captions
    image: bytes = b""
    table: list[list[Cell]] = field(default_factory=list)
    heads: int = 0  # heading rows of the table


class _Page(HTMLParser):
    """The blocks of the report's page, in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._open: list[str] = []
        self._text: list[str] = []
        self._attributes: dict[str, str] = {}
        self._table: Block | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if tag == "img":
            data = base64.b64decode(attributes["src"].partition(",")[2])
            self.blocks.append(Block("img", attributes.get("alt", ""), image=data))
        elif tag == "table":
            self._table = Block("table")
        elif tag == "tr" and self._table:
            self._table.table.append([])
        elif tag == "small":
            self._text.append("\n")
        if tag in _TEXT_TAGS:
            self._text, self._attributes = [], attributes
        if tag in _TEXT_TAGS or tag in _SKIPPED:
            self._open.append(tag)

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in _SKIPPED:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "table" and self._table:
            self.blocks.append(self._table)
            self._table = None
        elif tag == "thead" and self._table:
            self._table.heads = len(self._table.table)
        if not self._open or self._open[-1] != tag:
            return
        self._open.pop()
        if tag in _SKIPPED:
            return
        shown = "text" in self._attributes.get("class", "").split()  # keep line breaks, as on the page
        text = "".join(self._text).strip("\n") if shown else " ".join("".join(self._text).split())
        if tag in ("th", "td") and self._table:
            self._table.table[-1].append(self._cell(tag, text))
        elif tag == "caption" and self._table:
            self._table.text = text
        elif text:
            soft = tag == "figcaption" or "how" in self._attributes.get("class", "").split()
            self.blocks.append(Block(tag, text, soft=soft))

    def _cell(self, tag: str, text: str) -> Cell:
        names = self._attributes
        return Cell(
            text,
            columns=int(names.get("colspan", 1)),
            rows=int(names.get("rowspan", 1)),
            head=tag == "th",
            number="n" in names.get("class", "").split(),
        )


class _Document(FPDF):
    def __init__(self, title: str) -> None:
        super().__init__(format="A4")
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self.add_font("sans", "", fonts / "DejaVuSans.ttf")
        self.add_font("sans", "B", fonts / "DejaVuSans-Bold.ttf")
        self.add_font("mono", "", fonts / "DejaVuSansMono.ttf")
        self.set_title(title)
        self.set_lang("en")
        self.set_margin(15)
        self.set_auto_page_break(True, margin=18)
        self.set_font("sans", size=_BODY)

    def footer(self) -> None:
        self.set_y(-12)
        self.set_font("sans", size=_SMALL)
        self.set_text_color(*_SOFT)
        self.cell(0, 5, f"{self.title}, page {self.page_no()} of {{nb}}", align="C")


def write_pdf(page: Path) -> Path:
    """Write the PDF of a report's page beside it, atomically; return its path."""
    path = page.with_suffix(".pdf")
    write_bytes(path, to_pdf(page.read_text(encoding="utf-8")))
    return path


def to_pdf(html: str) -> bytes:
    """The report's HTML page as the bytes of a PDF."""
    blocks = _Page(html).blocks
    title = next((block.text for block in blocks if block.kind == "h1"), "Report")
    document = _Document(title)
    document.add_page()
    for block in blocks:
        _set(document, block)
    return bytes(document.output())


def _set(pdf: _Document, block: Block) -> None:
    pdf.set_text_color(*(_SOFT if block.soft else _INK))
    if block.kind == "table":
        _table(pdf, block)
    elif block.kind == "img":
        _image(pdf, block)
    elif block.kind in _SIZES:
        size = _SIZES[block.kind]
        if pdf.get_y() > pdf.eph - 15:  # no heading at the bottom of a page
            pdf.add_page()
        pdf.set_font("sans", "B", size)
        pdf.start_section(block.text[:80], level=int(block.kind[1]) - 1, strict=False)
        pdf.ln(size / 4)
        pdf.multi_cell(0, size / 2, block.text, align="L", new_x="LMARGIN", new_y="NEXT")
        pdf.ln(1.5)
    else:
        size = _SMALL if block.soft else _BODY
        pdf.set_font("sans", size=size)
        if block.kind == "pre":
            pdf.set_font("mono", size=size - 1.5)
        text = f"• {block.text}" if block.kind == "li" else block.text
        pdf.multi_cell(0, size / 2, text, align="L", new_x="LMARGIN", new_y="NEXT")
        pdf.ln(2)


def _image(pdf: _Document, block: Block) -> None:
    info = pdf.preload_image(io.BytesIO(block.image))[2]
    pixels_wide, pixels_high = float(info["w"]), float(info["h"])  # type: ignore[arg-type]
    width = min(pdf.epw, 25.4 * pixels_wide / 130)  # 130 pixels per inch: a plot 7.6 inches wide fills the page
    height = width * pixels_high / pixels_wide
    if pdf.get_y() + height > pdf.h - 30:
        pdf.add_page()
    pdf.image(io.BytesIO(block.image), w=width, h=height, alt_text=block.text)
    pdf.ln(1.5)


def _table(pdf: _Document, block: Block) -> None:
    width = max(sum(cell.columns for cell in row) for row in block.table)
    pdf.set_font("sans", "B", _BODY)
    if pdf.get_y() > pdf.eph - 25:
        pdf.add_page()
    pdf.ln(2)
    pdf.multi_cell(0, 5, block.text, align="L", new_x="LMARGIN", new_y="NEXT")
    size = _CELL if width < _NARROW else _CELL - 1.5
    pdf.set_font("sans", size=size)
    with pdf.table(
        borders_layout="HORIZONTAL_LINES",
        col_widths=_widths(block, width),
        first_row_as_headings=False,
        num_heading_rows=0,
        line_height=size / 2,
        padding=0.6,
        text_align="LEFT",
    ) as table:
        for number, cells in enumerate(block.table):
            row = table.row()
            for cell in cells:
                style = FontFace(emphasis="BOLD" if number < block.heads else None)
                align = "RIGHT" if cell.number else "LEFT"
                row.cell(cell.text, colspan=cell.columns, rowspan=cell.rows, style=style, align=align)
    pdf.ln(2)


def _widths(block: Block, columns: int) -> tuple[float, ...]:
    """Relative column widths: by the longest text, up to 40 characters, but wide enough for the longest word."""
    longest = [4.0] * columns
    for row in block.table:
        if len(row) > columns or any(cell.columns > 1 for cell in row):
            continue
        # Only cells at the left span rows: a row without them starts further right.
        for place, cell in enumerate(row, start=columns - len(row)):
            word = max(map(len, cell.text.split()), default=0)
            longest[place] = max(longest[place], min(len(cell.text), 40), min(word, 40) + 3)
    return tuple(longest)
