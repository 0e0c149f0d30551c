"""Report stage of a run, from its files alone: python scripts/report.py --run NAME."""

from rlhf.cli.report import main
from rlhf.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
