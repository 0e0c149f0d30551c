"""The settings of recipes and trainers: typed, with units, checked when they are created."""

from rlhf.config.ppo import PPOConfig, PPOStageConfig
from rlhf.config.precision import bf16_is_fast
from rlhf.config.stages import (
    EvaluationConfig,
    PreferenceConfig,
    PromptConfig,
    RatingConfig,
    ReportConfig,
    RewardStageConfig,
    RunConfig,
)

__all__ = [
    "EvaluationConfig",
    "PPOConfig",
    "PPOStageConfig",
    "PreferenceConfig",
    "PromptConfig",
    "RatingConfig",
    "ReportConfig",
    "RewardStageConfig",
    "RunConfig",
    "bf16_is_fast",
]
