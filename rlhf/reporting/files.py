"""The files of a report: page, plots, PDF and notebook, all made before any is written; older ones are removed."""

import unicodedata
from collections.abc import Mapping
from pathlib import Path

from rlhf.errors import UserError
from rlhf.reporting.notebook import make_notebook
from rlhf.reporting.pdf import to_pdf
from rlhf.reporting.report import draw, file_stem, pngs, render, write_page
from rlhf.reporting.run import read_run
from rlhf.reporting.seed_report import make_seed_page
from rlhf.storage.disk import write_bytes

_MARKS = (b'content="rlhf report"', b'<section id="stages">\n<h2>What was run</h2>')  # of pages made here, and before
_PLOTS = ("reward_", "ppo_", "evaluation_")


def write_report(run_dir: Path, title: str | None = None, author: str | None = None) -> list[Path]:
    """Write a run's report to run_dir/report: NAME.html, NAME.pdf, NAME.ipynb and the plots; return these three.

    NAME is "report", or made of author and title. Reports that were written there before under another name are
    removed, so that none is out of date. Raises UserError for a missing run folder, and for a malformed file in it.
    """
    title, author = (text and unicodedata.normalize("NFC", text) for text in (title, author))  # fonts have one Ä
    run = read_run(run_dir)
    figures = draw(run)
    images = pngs(figures)
    page = render(run, figures, title, author)
    path = run_dir / "report" / f"{file_stem(title, author)}.html"
    others = {
        path.with_suffix(".pdf"): to_pdf(page, images),
        path.with_suffix(".ipynb"): make_notebook(run, figures, title or f"RLHF run {run_dir.resolve().name}", author),
    }
    _remove_older(path, images)
    return _write(path, page, images, others)


def write_seed_report(
    folder: Path, run_dirs: list[Path], title: str | None = None, author: str | None = None
) -> list[Path]:
    """Write the report of several runs to folder/report: seeds.html, seeds.pdf and the plots; return the first two."""
    page, images = make_seed_page(folder, run_dirs, title, author)
    path = folder / "report" / "seeds.html"
    return _write(path, page, images, {path.with_suffix(".pdf"): to_pdf(page, images)})


def _write(path: Path, page: str, images: Mapping[str, bytes], others: Mapping[Path, bytes]) -> list[Path]:
    write_page(path, page, images)
    for other, content in others.items():
        write_bytes(other, content)
    return [path, *others]


def _remove_older(path: Path, images: Mapping[str, bytes]) -> None:
    """Remove what an earlier call wrote there: pages with our mark, what goes with them, and plots of other names."""
    try:
        for page in path.parent.glob("*.html"):
            if page != path and any(mark in page.read_bytes() for mark in _MARKS):
                for ending in (".pdf", ".ipynb", ".html"):
                    page.with_suffix(ending).unlink(missing_ok=True)
        for plot in path.parent.glob("*.png"):
            if plot.stem not in images and plot.stem.startswith(_PLOTS):
                plot.unlink()
    except OSError as error:
        raise UserError(f"{path.parent}: cannot remove the report that is there: {error.strerror}") from error
