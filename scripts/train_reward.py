"""Train a reward model: rlhf reward --config RECIPE/reward.yaml --run NAME."""

from rlhf.cli.__main__ import run

if __name__ == "__main__":
    run("reward")
