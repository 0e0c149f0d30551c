"""Reward training keeps a checkpoint wherever it measures the validation loss, so that the best one is there."""

import pytest

from rlhf.config import RewardStageConfig


@pytest.mark.parametrize(
    ("options", "strategy", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 3, "save_steps": 7}, "steps", 4),
        ({"eval_strategy": "steps", "logging_steps": 3}, "steps", 3),
        ({}, "epoch", 10),
    ],
)
def test_it_saves_when_it_evaluates(tmp_path, options, strategy, steps):
    args = RewardStageConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, **options)
    assert (args.save_strategy, args.save_steps) == (strategy, steps)
    assert (args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better) == (
        True,
        "eval_loss",
        False,
    )
    assert args.save_total_limit == 1


def test_more_checkpoints_are_kept_where_asked(tmp_path):
    args = RewardStageConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, save_total_limit=3)
    assert args.save_total_limit == 3
