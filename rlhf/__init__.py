"""The RLHF pipeline: reward model, PPO, evaluation, report."""

import logging
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.config import PPOConfig
    from rlhf.errors import UserError
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.reward.remote import RemoteReward

    __version__: str

# bitsandbytes tells every process on a CPU with bf16 to install a package that loads code from the hub: not here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = ["PPOConfig", "PPOTrainer", "RemoteReward", "UserError", "__version__"]

_WHERE = {
    "PPOConfig": "rlhf.config",
    "PPOTrainer": "rlhf.ppo.trainer",
    "RemoteReward": "rlhf.reward.remote",
    "UserError": "rlhf.errors",
}


def __getattr__(name: str) -> Any:
    """Loaded when asked for: the trainer takes seconds, which reports and small scripts do not need."""
    if name == "__version__":
        return metadata.version("rlhf")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
