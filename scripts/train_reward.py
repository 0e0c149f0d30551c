"""Train the reward model of a run: python scripts/train_reward.py --config RECIPE/reward.yaml --run NAME."""

from rlhf.cli.script import run_script
from rlhf.cli.train_reward import main

if __name__ == "__main__":
    run_script(main)
