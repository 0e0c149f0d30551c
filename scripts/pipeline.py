"""All stages of a run, one after another: python scripts/pipeline.py --recipe NAME --run NAME."""

from rlhf.cli.pipeline import main
from rlhf.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
