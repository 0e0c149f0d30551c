"""Write a run's report from its files: rlhf report --run NAME.

For several runs that differ in their seeds: rlhf report --run NAME --runs A B C.
"""

from pathlib import Path

from rlhf.cli.parsing import parse
from rlhf.cli.script import run_script
from rlhf.config import ReportConfig, RunConfig
from rlhf.console import quiet, screen
from rlhf.console.words import path_to
from rlhf.errors import UserError
from rlhf.reporting.notebook import write_notebook
from rlhf.reporting.pdf import write_pdf
from rlhf.reporting.report import build_report
from rlhf.reporting.run import read_run as read_folder
from rlhf.reporting.seed_report import build_seed_report
from rlhf.storage.stages import STAGES, meant_run, read_run


def main() -> None:
    run, config = parse([RunConfig, ReportConfig])
    folder = run.folder()
    if config.runs:
        if run.run == RunConfig.run:
            raise UserError(f"run: give --run a name for the folder of this report, not {run.run!r}")
        report = build_seed_report(
            folder, [Path(run.runs_dir) / name for name in config.runs], config.title, config.author
        )
        screen.say(f"report: {report}, {write_pdf(report).name}")
        return
    if not any(read_run(folder / stage) for stage in STAGES):
        raise UserError(f"{folder}: not a run folder: it has none of {', '.join(STAGES)}{meant_run(folder)}")
    quiet.log_to(folder / "logs", "report")
    report = build_report(folder, config.title, config.author)
    notebook = write_notebook(read_folder(folder), report.with_suffix(".ipynb"), config.title or f"RLHF run {run.run}")
    pdf = write_pdf(report)
    if not screen.is_part():
        screen.to_copy(f"Report  {path_to(report)}, {pdf.name}, {notebook.name}")
        screen.to_copy(f"Curves  tensorboard --logdir {path_to(folder)}")


if __name__ == "__main__":
    run_script(main)
