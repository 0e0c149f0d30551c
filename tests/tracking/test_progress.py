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
    none = row | {"eps": 0.0}  # as after a step without time
    assert PPORows().cells(TrainerState(global_step=1, max_steps=4), none)[0] == "1.00 ± 2.00"


def test_the_time_left_is_of_all_steps_so_far():
    rows, row = PPORows(), dict.fromkeys(("objective/scores", "objective/scores_std", "eps"), 1.0)
    row |= dict.fromkeys(("objective/kl_per_token", "objective/response_length", "objective/eos_rate"), 1.0)
    left = [
        rows.cells(TrainerState(global_step=step, max_steps=10), row | {"time/learn": seconds})[5]
        for step, seconds in ((1, 100.0), (2, 10.0), (3, 20.0))
    ]
    assert left == ["15:00", "1:20", "1:45"]


def test_a_run_that_resumes_has_rows_for_the_steps_that_it_does():
    rows = RewardRows(rows=3)
    rows.on_train_begin(None, TrainerState(max_steps=40, global_step=30), None)
    assert (rows.steps.total, rows.steps.done, rows.steps.every) == (40, 30, 5)


@pytest.mark.parametrize(("trained", "cells"), [({"loss": 0.5, "accuracy": 0.75}, ["0.500", "75 %"]), ({}, ["–", "–"])])
def test_an_evaluation_of_the_reward_model_stands_beside_what_training_logged_last(trained, cells):
    rows = RewardRows()
    assert rows.cells(TrainerState(), trained) == []
    found = rows.cells(TrainerState(), {"eval_loss": 0.25, "eval_accuracy": 0.9})
    assert found == [*cells, "0.250", "90 %"]
