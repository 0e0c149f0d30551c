"""The RLHF pipeline: reward model, PPO, evaluation, report."""
