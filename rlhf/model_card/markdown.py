"""Markdown from names and texts of configs and data, which must not become markup."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf.errors import printable


def plain(text: str) -> str:
    """Any text on one line, with everything escaped that would be markup, or mathematics in a notebook."""
    return re.sub(r"[!-/:-@\[-`{-~]", r"\\\g<0>", printable(text))


def code(value: Any) -> str:
    """Any value as a code span on one line; sequences with commas; "" for None or ""."""
    if isinstance(value, list | tuple | set):
        value = ", ".join(map(str, value))
    text = "".join(c if c.isprintable() else " " for c in str("" if value is None else value)).strip()
    if not text:
        return ""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; "" if there are no rows. Cells are Markdown on one line; pipes are escaped here."""
    lines = [_row(row) for row in rows]
    return "\n".join([_row(header), "|" + "---|" * len(header), *lines]) if lines else ""


def _row(cells: Sequence[str]) -> str:
    # A backslash before an escaped pipe would undo the escape, and the pipe would end the cell.
    return "| " + " | ".join(cell.replace("\\|", "\\ |").replace("|", "\\|") for cell in cells) + " |"
