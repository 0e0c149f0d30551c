"""Time this trainer against TRL 1.12's on the same work, A B A B: rlhf benchmark --shape seed --trl DIR."""

from rlhf.cli.benchmark import main
from rlhf.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
