"""Evaluate base and trained policies on unseen prompts: rlhf evaluate --config RECIPE/evaluation.yaml --run NAME."""

from rlhf.cli.__main__ import run

if __name__ == "__main__":
    run("evaluate")
