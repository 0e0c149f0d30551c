"""Train a reward model: rlhf reward --config RECIPE/reward.yaml --run NAME."""

from rlhf.cli.script import run_script
from rlhf.cli.train_reward import main

if __name__ == "__main__":
    run_script(main)
