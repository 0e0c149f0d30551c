"""Report stage of a run, from its files alone: python scripts/report.py --run NAME."""

from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.parsing import parse, run_script
from rlhf.reporting.pdf import write_pdf
from rlhf.reporting.report import build_report
from rlhf.runtime.run_folder import read_run

STAGES = ("reward", "ppo_full", "ppo_lora", "evaluation")


def main() -> None:
    (run,) = parse([RunConfig])
    folder = run.folder()
    if not any(read_run(folder / stage) for stage in STAGES):
        raise UserError(f"{folder}: expected a run folder with {', '.join(STAGES)}, found none of them")
    report = build_report(folder)
    print(f"report: {report} and {write_pdf(report).name}   curves: tensorboard --logdir {folder}")


if __name__ == "__main__":
    run_script(main)
