"""Write a run's report from its files: rlhf report --run NAME.

For several runs that differ in their seeds: rlhf report --run NAME --runs A B C.
"""

import json
from pathlib import Path

from rlhf.cli.parsing import parse
from rlhf.cli.script import run_script
from rlhf.config import ReportConfig, RunConfig
from rlhf.console import quiet, screen
from rlhf.console.words import path_to
from rlhf.errors import UserError
from rlhf.file_types import RunFile
from rlhf.reporting.notebook import write_notebook
from rlhf.reporting.pdf import write_pdf
from rlhf.reporting.report import build_report
from rlhf.reporting.run import read_run as read_folder
from rlhf.reporting.seed_report import build_seed_report
from rlhf.storage.basis import report_files
from rlhf.storage.disk import write_bytes
from rlhf.storage.stages import STAGES, meant_run, read_run


def main() -> None:
    run, config = parse([RunConfig, ReportConfig])
    folder = run.folder()
    if config.runs:
        if run.run == RunConfig.run:
            raise UserError(f"run: give --run a name for the folder of this report, not {run.run!r}")
        runs = [Path(run.runs_dir) / name for name in config.runs]
        files = report_files(*runs)
        report = build_seed_report(folder, runs, config.title, config.author)
        pdf = write_pdf(report)
        _record(report.parent, files, config)
        screen.say(f"Report on all runs  {path_to(report)}, {pdf.name}")
        return
    if not any(read_run(folder / stage) for stage in STAGES):
        raise UserError(f"{folder}: not a run folder: it has none of {', '.join(STAGES)}{meant_run(folder)}")
    quiet.log_to(folder / "logs", "report")
    files = report_files(folder)
    report = build_report(folder, config.title, config.author)
    notebook = write_notebook(read_folder(folder), report.with_suffix(".ipynb"), config.title or f"RLHF run {run.run}")
    pdf = write_pdf(report)
    _record(report.parent, files, config)
    if not screen.is_part():
        screen.to_copy(f"Report  {path_to(report)}, {pdf.name}, {notebook.name}")
        screen.to_copy(f"Curves  tensorboard --logdir {path_to(folder)}")


def _record(folder: Path, files: dict[str, str], config: ReportConfig) -> None:
    """What the report was made of, so that the pipeline knows whether it still holds."""
    facts: RunFile = {"stage": "report", "status": "done", "files": files, "title": config.title}
    facts["author"] = config.author
    write_bytes(folder / "run.json", json.dumps(facts, indent=2, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    run_script(main)
