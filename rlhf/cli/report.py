"""Report stage of a run, from its files alone: python scripts/report.py --run NAME.

Of several runs that differ in their seeds: python scripts/report.py --run NAME --runs A B C.
"""

from pathlib import Path

from rlhf.cli.parsing import parse
from rlhf.cli.script import run_script
from rlhf.config import ReportConfig, RunConfig
from rlhf.errors import UserError
from rlhf.reporting.notebook import write_notebook
from rlhf.reporting.pdf import write_pdf
from rlhf.reporting.report import build_report
from rlhf.reporting.run import read_run as read_folder
from rlhf.reporting.seed_report import build_seed_report
from rlhf.storage.stages import STAGES, read_run


def main() -> None:
    run, config = parse([RunConfig, ReportConfig])
    folder = run.folder()
    if config.runs:
        if run.run == RunConfig.run:
            raise UserError(f"run: expected the name of a folder for the report of --runs, found {run.run!r}")
        report = build_seed_report(
            folder, [Path(run.runs_dir) / name for name in config.runs], config.title, config.author
        )
        print(f"report: {report}, {write_pdf(report).name}")
        return
    if not any(read_run(folder / stage) for stage in STAGES):
        raise UserError(f"{folder}: expected a run folder with {', '.join(STAGES)}, found none of them")
    report = build_report(folder, config.title, config.author)
    notebook = write_notebook(read_folder(folder), report.with_suffix(".ipynb"), config.title or f"RLHF run {run.run}")
    print(f"report: {report}, {write_pdf(report).name}, {notebook.name}   curves: tensorboard --logdir {folder}")


if __name__ == "__main__":
    run_script(main)
