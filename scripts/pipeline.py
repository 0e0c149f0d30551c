"""Run all stages of a recipe, one after another: rlhf pipeline --recipe NAME --run NAME."""

from rlhf.cli.__main__ import run

if __name__ == "__main__":
    run("pipeline")
