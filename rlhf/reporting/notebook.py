"""The report as a notebook that recomputes every table and figure from the files of the run folder.

Its text and code are in notebook.md, in parts separated by a line `%%%%`: the field of `Run` that a part needs, its
text, its code.
"""

import json
import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from rlhf.model_card.markdown import plain
from rlhf.reporting.run import Run
from rlhf.storage.run_folder import write_text

_PART = re.compile(r"needs: (\w+)\n\n(.+?)\n\n```python\n(.+?)\n```\n?", re.DOTALL)


def write_notebook(run: Run, path: Path, title: str) -> Path:
    """Write the notebook of a run to path, not executed; parts whose data are missing have no cells."""
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    cells = []
    for part in text.split("\n%%%%\n"):
        found = _PART.fullmatch(part)
        if found is None:
            raise ValueError(f"notebook.md: expected needs, text and code, found {part[:60]!r}")
        needs, words, code = found.groups()
        if getattr(run, needs):
            folder = json.dumps(str(run.path.resolve()))
            cells += [
                new_markdown_cell(words.replace("{title}", plain(title))),
                new_code_cell(code.replace("{run_dir}", folder)),
            ]
    if not run.ratings:
        cells.append(new_markdown_cell("## Human rating\n\nThere are no ratings yet."))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # not random, so that the same run gives the same file
    notebook = new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    write_text(path, nbformat.writes(notebook))
    return path
