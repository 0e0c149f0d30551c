"""The RLHF pipeline: reward model, PPO, evaluation, report."""

import logging

# bitsandbytes tells every process on a CPU with bf16 to install a package that loads code from the hub: not here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from rlhf.config import PPOConfig  # noqa: E402
from rlhf.errors import UserError  # noqa: E402
from rlhf.ppo.trainer import PPOTrainer  # noqa: E402

__all__ = ["PPOConfig", "PPOTrainer", "UserError"]
