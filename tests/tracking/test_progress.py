"""Rows of the console, by hand."""

import pytest
from transformers import TrainerState

from rlhf.tracking.progress import PPORows, RewardRows


def test_a_ppo_step_by_hand():
    """32 responses in 8 seconds, of a standard deviation of 2: a standard error of 2 / sqrt(32)."""
    row = {
        "objective/scores": 1.0,
        "objective/scores_std": 2.0,
        "eps": 4.0,
        "time/generate": 5.0,
        "time/learn": 3.0,
        "objective/kl_per_token": 0.0123,
        "objective/response_length": 20.25,
        "objective/eos_rate": 0.75,
    }
    cells = PPORows().cells(TrainerState(global_step=1, max_steps=4), row)
    assert cells[:5] == ["1.00 ± 0.35", "0.012", "20.2", "75 %", "8.0"]
    assert PPORows().cells(TrainerState(), {"eval/scores": 1.0}) == []
    long = row | {"time/learn": 5.0}
    assert PPORows().cells(TrainerState(global_step=1, max_steps=4), long)[4] == "10"


@pytest.mark.parametrize(("trained", "cells"), [({"loss": 0.5, "accuracy": 0.75}, ["0.500", "75 %"]), ({}, ["–", "–"])])
def test_an_evaluation_of_the_reward_model_stands_beside_what_training_logged_last(trained, cells):
    rows = RewardRows()
    assert rows.cells(TrainerState(), trained) == []
    found = rows.cells(TrainerState(), {"eval_loss": 0.25, "eval_accuracy": 0.9})
    assert found == [*cells, "0.250", "90 %"]
