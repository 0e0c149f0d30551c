"""The report as a notebook that recomputes every table and figure from the files of the run folder, outputs included.

Its text and code are in notebook.md, in parts separated by a line `%%%%`: the field of `Run` that a part needs, its
text, its code. The outputs come from running the code here, in this process, so that no Jupyter is needed.
"""

import ast
import base64
import io
import re
import sys
from code import InteractiveInterpreter
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from rlhf.errors import printable
from rlhf.model_card.markdown import plain
from rlhf.reporting.run import Run, printable_run

_PART = re.compile(r"needs: (\w+)\n\n(.+?)\n\n```python\n(.+?)\n```\n?", re.DOTALL)
_READS = "run = "  # the cell that reads the run folder, which has been read here already
_OPTIONS = ("display.html.use_mathjax", "display.max_colwidth")  # of pandas, which cells set


def make_notebook(run: Run, figures: Mapping[str, Figure], title: str, author: str | None = None) -> bytes:
    """The notebook of a run, with outputs; parts whose data are missing have no cells.

    figures: `draw` of the run; title, author: for the heading. A cell that fails shows its error, as in Jupyter, and
    the others are run nevertheless.
    """
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    space: dict[str, Any] = {"__name__": "__main__"}
    known = {"run": printable_run(run), "figures": dict(figures)}
    heading = plain(title) + (f"\n\n{plain(author)}" if author else "")
    cells: list[Any] = []
    before = {name: pd.get_option(name) for name in _OPTIONS}
    try:
        for part in text.split("\n%%%%\n"):
            found = _PART.fullmatch(part)
            if found is None:
                raise ValueError(f"notebook.md: expected needs, text and code, found {part[:60]!r}")
            needs, words, code = found.groups()
            if not getattr(run, needs):
                continue
            if code.startswith(_READS):
                space |= known
                outputs = []
            else:
                outputs = _outputs(code, space, len(cells))
            cells += [
                new_markdown_cell(words.replace("{title}", heading)),
                new_code_cell(code, outputs=outputs, execution_count=len(cells) // 2 + 1),
            ]
    finally:
        for name, value in before.items():
            pd.set_option(name, value)
    if not run.ratings:
        cells.append(new_markdown_cell("## Human rating\n\nThere are no ratings yet."))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # not random, so that the same run gives the same file
    notebook = new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    written: str = nbformat.writes(notebook)
    return written.encode("utf-8", "replace")


class _Outputs(io.StringIO):
    """What a cell prints and displays, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def display(self, *values: Any) -> None:
        """As Jupyter's `display`."""
        self.end()
        self.found += [new_output("display_data", data=_forms(value)) for value in values]

    def end(self) -> None:
        """Close what was printed so far."""
        if text := self.getvalue():
            self.found.append(new_output("stream", name="stdout", text=text))
        self.seek(0)
        self.truncate()


class _Cell(InteractiveInterpreter):
    """Runs a cell's statements one by one; keeps the first error."""

    error: BaseException | None = None

    def showtraceback(self) -> None:
        self.error = sys.exc_info()[1]


def _outputs(code: str, space: dict[str, Any], number: int) -> list[Any]:
    """Run a cell's code in the name space of the notebook, and collect its outputs."""
    outputs, cell = _Outputs(), _Cell(space)
    space["display"] = outputs.display
    shown: list[Any] = []  # values of the statement that ran last
    hook, sys.displayhook = sys.displayhook, shown.append
    try:
        with redirect_stdout(outputs):
            for statement in ast.parse(code).body:
                shown.clear()
                cell.runsource(f"{ast.get_source_segment(code, statement)}\n\n", "notebook.md", "single")
                if cell.error:
                    break
    finally:
        sys.displayhook = hook
    outputs.end()
    if cell.error:  # whatever is odd in a run's files: the other cells are of use
        name, said = type(cell.error).__name__, printable(f"{type(cell.error).__name__}: {cell.error}")
        outputs.found.append(new_output("error", ename=name, evalue=said, traceback=[said]))
    elif shown and shown[-1] is not None:
        count = number // 2 + 1
        outputs.found.append(new_output("execute_result", data=_forms(shown[-1]), execution_count=count))
    return outputs.found


def _forms(value: Any) -> dict[str, str]:
    """A value in the forms that a notebook may show: text, and a table or an image if it has one."""
    forms = {"text/plain": repr(value)}
    if hasattr(value, "_repr_html_"):
        forms["text/html"] = value._repr_html_()
    if hasattr(value, "_repr_png_"):
        forms["image/png"] = base64.b64encode(value._repr_png_()).decode() + "\n"
    return forms
