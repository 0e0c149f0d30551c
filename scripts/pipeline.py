"""Run all stages of a recipe, one after another: rlhf pipeline --recipe NAME --run NAME."""

from rlhf.cli.pipeline import main
from rlhf.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
