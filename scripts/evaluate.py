"""Evaluate base and trained policies on unseen prompts: rlhf evaluate --config RECIPE/evaluation.yaml --run NAME."""

from rlhf.cli.evaluate import main
from rlhf.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
