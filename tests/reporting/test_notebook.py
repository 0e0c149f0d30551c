"""The notebook runs from top to bottom on a run folder, and finds a number that was changed."""

import json

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_report import run_dir as run_dir  # the fixture: a run folder with everything in it

from rlhf.evaluation.summary import summarise
from rlhf.reporting.notebook import write_notebook
from rlhf.reporting.run import read_run


@pytest.fixture
def evaluated(run_dir):
    """The run with an evaluation.json that goes with its responses."""
    path = run_dir / "evaluation" / "responses.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row.update(
            score=float(i % 7), prompt_length=5 + i % 3, response_length=9 + i % 5, eos=True, gold_score=i % 11 / 2
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = summarise(rows, ["base", "full", "lora"], 0.95, 0)
    (run_dir / "evaluation" / "evaluation.json").write_text(json.dumps(summary))
    return run_dir


def execute(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(path.parent))
    return notebook


def test_it_runs_and_shows_what_the_report_shows(evaluated, tmp_path):
    path = write_notebook(read_run(evaluated), tmp_path / "report.ipynb", "A title")
    notebook = execute(path)
    nbformat.validate(notebook)
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 10
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    texts = "".join(o.get("text", "") + str(o.get("data", {}).get("text/html", "")) for o in outputs)
    for words in ("moderate: 0.050 nats per token", "full: The proxy", "def gae(", "134515008", "0.871"):
        assert words in texts, words
    assert "<script>alert" not in "".join(str(o.get("data", {}).get("text/html", "")) for o in outputs)


def test_a_figure_that_was_changed_is_found(evaluated, tmp_path):
    file = evaluated / "evaluation" / "evaluation.json"
    summary = json.loads(file.read_text())
    summary["gains"]["full"]["gain"] += 0.5
    file.write_text(json.dumps(summary))
    path = write_notebook(read_run(evaluated), tmp_path / "report.ipynb", "A title")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(path)


def test_an_empty_run_has_a_notebook_too(tmp_path):
    path = write_notebook(read_run(tmp_path), tmp_path / "report.ipynb", "Nothing")
    cells = nbformat.read(path, as_version=4).cells
    assert "There are no ratings yet." in cells[-1].source
    assert path.read_bytes() == write_notebook(read_run(tmp_path), path, "Nothing").read_bytes()
