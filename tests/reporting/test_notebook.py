"""The notebook has its outputs, gives the same ones in Jupyter, and finds a number that was changed."""

import json

import nbformat
import pandas as pd
import pytest
from limits import HANG
from nbclient import NotebookClient
from test_report import run_dir as run_dir  # the fixture: a run folder with everything in it

from rlhf.evaluation.summary import summarise
from rlhf.reporting.notebook import _outputs, make_notebook
from rlhf.reporting.report import draw
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


def made(run_dir, title="A title", author=None):
    """The notebook of a run, where it belongs."""
    run = read_run(run_dir)
    path = run_dir / "report" / "report.ipynb"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(make_notebook(run, draw(run), title, author))
    return path


def execute(path):
    """Run it in Jupyter's kernel; returns it with the outputs from there."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.outputs = []
    NotebookClient(notebook, timeout=HANG, kernel_name="python3").execute(cwd=str(path.parent))
    return notebook


def outputs(notebook):
    """(kind, data or text) of each output, one stream of a cell as one."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            same = found and output.output_type == "stream" and found[-1][0] == "stream" and found[-1][2] == cell.id
            if same:
                found[-1] = ("stream", found[-1][1] + output.text, cell.id)
            else:
                shown = output.get("text", output.get("data"))
                if "text/html" in shown:  # a table's plain text depends on the width of the terminal
                    shown = {kind: data for kind, data in shown.items() if kind != "text/plain"}
                if "image/png" in shown:  # its bytes depend on how Jupyter sets up matplotlib
                    shown = shown["text/plain"] + ".png"
                found.append((output.output_type, shown, cell.id))
    return [entry[:2] for entry in found]


def test_it_shows_what_the_report_shows_and_jupyter_the_same(evaluated):
    path = made(evaluated, author="Ä. Student")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    found = outputs(notebook)
    pictures = [data for kind, data in found if kind == "display_data" and isinstance(data, str)]
    assert sorted(pictures) == sorted(f"{name}.png" for name in draw(read_run(evaluated)))
    assert {kind for kind, _ in found} == {"stream", "display_data", "execute_result"}
    texts = "".join(str(data) for _, data in found)
    for words in (
        "moderate: 0.050 nats per token",
        "full: The proxy",
        "def gae(",
        "134,515,008",
        "0.871",
        "/ 200 = 0.655",
    ):
        assert words in texts, words
    assert "<script>alert" not in "".join(data["text/html"] for _, data in found if isinstance(data, dict))
    assert notebook.cells[0].source.startswith("# A title\n\nÄ\\. Student\n")
    again = execute(path)
    assert outputs(again) == found


def test_no_path_of_the_machine_is_in_it(evaluated):
    text = made(evaluated).read_text(encoding="utf-8")
    assert str(evaluated) not in text
    assert str(evaluated.parent) not in text
    assert 'read_run(Path(\\"..\\"))' in text


def test_a_figure_that_was_changed_is_found(evaluated):
    file = evaluated / "evaluation" / "evaluation.json"
    summary = json.loads(file.read_text())
    summary["gains"]["full"]["gain"] += 0.5
    file.write_text(json.dumps(summary))
    notebook = nbformat.read(made(evaluated), as_version=4)
    (error,) = [o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert error.ename == "AssertionError"
    assert "'full'" in error.evalue
    assert "def gae(" in str(notebook.cells)  # the cells after it were run


def test_an_empty_run_has_a_notebook_too_and_pandas_is_left_as_it_was(tmp_path):
    width = pd.get_option("display.max_colwidth")
    path = made(tmp_path, "Nothing")
    cells = nbformat.read(path, as_version=4).cells
    assert "There are no ratings yet." in cells[-1].source
    assert path.read_bytes() == made(tmp_path, "Nothing").read_bytes()
    assert pd.get_option("display.max_colwidth") == width


def test_a_cell_shows_its_last_value_and_what_it_prints_before():
    def kinds(code):
        return [
            (one.output_type, one.get("text", one.get("data", {}).get("text/plain"))) for one in _outputs(code, {}, 4)
        ]

    assert kinds("print('a')\n1\n7") == [("stream", "a\n"), ("execute_result", "7")]
    assert kinds("7\nx = 1") == []
    assert kinds("7\nNone") == []
    assert kinds("print('a')\ndisplay(1, 2)\nprint('b')") == [
        ("stream", "a\n"),
        ("display_data", "1"),
        ("display_data", "2"),
        ("stream", "b\n"),
    ]
    *_, (last, _) = kinds("print('a')\n1 / 0\nprint('not this')")
    assert (last, len(kinds("print('a')\n1 / 0\nprint('not this')"))) == ("error", 2)
    assert _outputs("7", {}, 4)[0].execution_count == 3  # of text and code, the third pair
