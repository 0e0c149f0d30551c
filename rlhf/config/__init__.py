"""The settings of recipes, commands and trainers: typed, with units, checked when they are created."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.config.commands import (
        BenchmarkConfig,
        CompareConfig,
        ExportConfig,
        GpuCheckConfig,
        PipelineConfig,
        PrepareConfig,
    )
    from rlhf.config.model import ModelConfig
    from rlhf.config.ppo import PPOConfig, PPOStageConfig
    from rlhf.config.precision import bf16_is_fast
    from rlhf.config.reward import RewardStageConfig
    from rlhf.config.stages import (
        EvaluationConfig,
        PreferenceConfig,
        PromptConfig,
        RatingConfig,
        ReportConfig,
        RunConfig,
        StageRunConfig,
    )

__all__ = [
    "BenchmarkConfig",
    "CompareConfig",
    "EvaluationConfig",
    "ExportConfig",
    "GpuCheckConfig",
    "ModelConfig",
    "PPOConfig",
    "PPOStageConfig",
    "PipelineConfig",
    "PreferenceConfig",
    "PrepareConfig",
    "PromptConfig",
    "RatingConfig",
    "ReportConfig",
    "RewardStageConfig",
    "RunConfig",
    "StageRunConfig",
    "bf16_is_fast",
]

_ELSEWHERE = {
    "BenchmarkConfig": "commands",
    "CompareConfig": "commands",
    "ExportConfig": "commands",
    "GpuCheckConfig": "commands",
    "PipelineConfig": "commands",
    "PrepareConfig": "commands",
    "ModelConfig": "model",
    "PPOConfig": "ppo",
    "PPOStageConfig": "ppo",
    "RewardStageConfig": "reward",
    "bf16_is_fast": "precision",
}


def __getattr__(name: str) -> Any:
    """Loaded when asked for: the settings of the trainers take seconds, which reports and `--help` do not need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rlhf.config.{_ELSEWHERE.get(name, 'stages')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
