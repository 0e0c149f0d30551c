"""Train a policy with PPO: rlhf ppo --config RECIPE/ppo_full.yaml --run NAME."""

from rlhf.cli.__main__ import run

if __name__ == "__main__":
    run("ppo")
