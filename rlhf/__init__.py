"""The RLHF pipeline: reward model, PPO, evaluation, report."""

from rlhf.config import PPOConfig
from rlhf.errors import UserError
from rlhf.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer", "UserError"]
