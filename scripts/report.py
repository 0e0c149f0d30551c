"""Write a run's report from its files: rlhf report --run NAME."""

from rlhf.cli.report import main
from rlhf.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
