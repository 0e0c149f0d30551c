"""A run has one report: page, PDF and notebook of the same content, and nothing older beside them."""

import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import nbformat
import pytest
from pypdf import PdfReader
from test_report import run_dir as run_dir  # the fixture: a run folder with everything in it

from rlhf.errors import UserError
from rlhf.reporting import files
from rlhf.reporting.files import write_report
from rlhf.reporting.report import draw, file_stem
from rlhf.reporting.run import read_run


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "report").iterdir() if path.suffix != ".png"}


@pytest.mark.parametrize(
    ("author", "stem"),
    [
        ("Ä. Student", "Ä_Student_Gains"),
        ("A\u0308. Student", "Ä_Student_Gains"),  # the same in two characters
        ("Ελένη Παππά", "Ελένη_Παππά_Gains"),
        ("Мария И.", "Мария_И_Gains"),
        ("山田太郎", "山田太郎_Gains"),
    ],
)
def test_an_author_is_there_in_any_script(tmp_path: Path, author: str, stem: str) -> None:
    (tmp_path / "reward").mkdir()
    page, pdf, notebook = write_report(tmp_path, "Gains", author)
    assert (page.name, pdf.name, notebook.name) == tuple(f"{stem}.{end}" for end in ("html", "pdf", "ipynb"))
    author = unicodedata.normalize("NFC", author)
    assert f">{author}</p>" in page.read_text(encoding="utf-8")
    assert author in nbformat.read(notebook, as_version=4).cells[0].source.replace("\\", "")
    text = " ".join(PdfReader(pdf).pages[0].extract_text().split())
    if author == "山田太郎":
        assert "4 characters of this report (Chinese), such as U+592A" in text
    else:
        assert author in text
        assert "are not in this PDF's font" not in text


def test_no_older_report_stays_beside_a_new_one(run_dir: Path) -> None:
    write_report(run_dir)
    assert names(run_dir) == {"report.html", "report.pdf", "report.ipynb"}
    mine = run_dir / "report" / "mine.html"
    mine.write_text("<p>my own notes</p>")
    (run_dir / "report" / "mine.png").write_bytes(b"mine")
    (run_dir / "report" / "ppo_old_plot.png").write_bytes(b"of an older version")
    write_report(run_dir, author="Ä. Student")
    assert names(run_dir) == {"mine.html", "Ä_Student.html", "Ä_Student.pdf", "Ä_Student.ipynb"}
    plots = {path.stem for path in (run_dir / "report").glob("*.png")}
    assert plots == {"mine", *draw(read_run(run_dir))}
    write_report(run_dir)
    assert names(run_dir) == {"mine.html", "report.html", "report.pdf", "report.ipynb"}


def test_of_older_reports_only_what_was_made_here_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    old = b'<body><section id="stages">\n<h2>What was run</h2>'  # before pages had a mark
    for name, content in (
        ("old.html", old),
        ("old.pdf", b""),
        ("old.ipynb", b""),
        ("mine.html", b"x"),
        ("mine.pdf", b""),
    ):
        (folder / name).write_bytes(content)
    (folder / "bare.html").write_bytes(b'<meta content="rlhf report">')  # its PDF was moved away
    for name in ("reward_old", "evaluation_old", "seeds_kl", "my_ppo_plot"):
        (folder / f"{name}.png").write_bytes(b"")
    write_report(tmp_path)
    assert names(tmp_path) == {"mine.html", "mine.pdf", "report.html", "report.pdf", "report.ipynb"}
    assert {path.stem for path in folder.glob("*.png")} == {"seeds_kl", "my_ppo_plot"}


def test_a_report_that_cannot_be_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "report" / "old.html").mkdir(parents=True)
    with pytest.raises(UserError, match=r"report: cannot remove the report that is there: Is a directory"):
        write_report(tmp_path)


def test_a_title_and_an_author_are_in_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "first"
    (run / "reward").mkdir(parents=True)
    monkeypatch.chdir(run)
    for title, heading in (("Ga\u0308ins", "Gäins"), (None, "RLHF run first")):
        page, pdf, notebook = write_report(Path(), title, "A\u0308nn")
        assert f"<h1>{heading}</h1>" in page.read_text(encoding="utf-8")
        assert PdfReader(pdf).metadata.title == heading
        assert nbformat.read(notebook, as_version=4).cells[0].source.split("\n\n")[:2] == [f"# {heading}", "Änn"]


def test_nothing_is_written_or_removed_if_a_part_cannot_be_made(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(run_dir)
    before = {path: path.read_bytes() for path in (run_dir / "report").iterdir()}

    def fail(*_: object) -> bytes:
        raise UserError("no")

    monkeypatch.setattr(files, "make_notebook", fail)
    with pytest.raises(UserError, match="no"):
        write_report(run_dir, "Another title")
    assert {path: path.read_bytes() for path in (run_dir / "report").iterdir()} == before


def test_a_report_needs_no_torch() -> None:
    """Nor anything else that takes seconds to import and that it makes no use of."""
    slow = "{'torch', 'transformers', 'trl', 'accelerate', 'datasets', 'sklearn'}"
    code = f"import sys, rlhf.reporting.files; sys.exit(str({slow} & set(sys.modules) or ''))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600).stderr.strip() == ""
    )


def test_a_long_name_fits_a_file_system() -> None:
    stem = file_stem("ж" * 300, "Ä")
    assert len(f"{stem}.html".encode()) < 200
    assert re.fullmatch("Ä_ж+", stem)
    assert file_stem("...", None) == file_stem(None, None) == "report"
