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
from rlhf.reporting.files import write_report, write_seed_report
from rlhf.storage.basis import report_files
from rlhf.storage.disk import write_bytes
from rlhf.storage.stages import STAGES, meant_run, read_run, stale_lines


def main() -> None:
    run, config = parse([RunConfig, ReportConfig])
    folder = run.folder()
    if config.runs:
        if run.run == RunConfig.run:
            raise UserError(f"run: give --run a name for the folder of this report, not {run.run!r}")
        runs = [Path(run.runs_dir) / name for name in config.runs]
        _warn_of_stale(*runs)
        files = report_files(*runs)
        page, pdf = write_seed_report(folder, runs, config.title, config.author)
        _record(page, files, config)
        screen.say(f"Report on all runs  {path_to(page)}, {pdf.name}")
        return
    if not any(read_run(folder / stage) for stage in STAGES):
        raise UserError(f"{folder}: not a run folder: it has none of {', '.join(STAGES)}{meant_run(folder)}")
    quiet.log_to(folder / "logs", "report")
    _warn_of_stale(folder)
    files = report_files(folder)
    page, pdf, notebook = write_report(folder, config.title, config.author)
    _record(page, files, config)
    if not screen.is_part():
        screen.to_copy(f"Report  {path_to(page)}, {pdf.name}, {notebook.name}")
        screen.to_copy(f"Curves  tensorboard --logdir {path_to(folder)}")


def _warn_of_stale(*runs: Path) -> None:
    for run in runs:
        for line in stale_lines(run):
            screen.warn(line)


def _record(page: Path, files: dict[str, str], config: ReportConfig) -> None:
    """What the report was made of, so that the pipeline knows whether it still holds."""
    facts: RunFile = {"stage": "report", "status": "done", "files": files, "page": page.name}
    facts |= {"title": config.title, "author": config.author}
    write_bytes(page.with_name("run.json"), json.dumps(facts, indent=2, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    run_script(main)
