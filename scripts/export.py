"""Save a PPO checkpoint as a model: rlhf export --run NAME --stage ppo_full --checkpoint step-20 --output DIR."""

from rlhf.cli.__main__ import run

if __name__ == "__main__":
    run("export")
