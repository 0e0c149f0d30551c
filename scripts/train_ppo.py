"""Train a policy with PPO: rlhf ppo --config RECIPE/ppo_full.yaml --run NAME."""

from rlhf.cli.script import run_script
from rlhf.cli.train_ppo import main

if __name__ == "__main__":
    run_script(main)
