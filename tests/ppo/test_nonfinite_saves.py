"""While updates are being left out, no checkpoint pushes an earlier one over the limit."""

import math
import os
import signal

import pytest
from tiny_ppo import trainer
from transformers import TrainerCallback

from rlhf.errors import UserError
from rlhf.storage.checkpoint import checkpoints


def bad_in(*steps):
    """A reward whose scores are infinite in these steps, and finite in all others."""
    calls = []

    def reward(completions, **_):
        calls.append(1)
        return [math.inf if len(calls) in steps else float(i) for i in range(len(completions))]

    return reward


def saved(folder):
    return [path.name for path in checkpoints(folder)]


def test_the_last_good_checkpoints_outlive_a_run_that_breaks_down(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_skipped_updates": 4}
    run = trainer(tmp_path, reward=bad_in(4, 5, 6, 7), max_steps=9, **options)
    with pytest.raises(UserError, match=r"4 times in a row, last in step 7 .* earlier checkpoints are intact"):
        run.train()
    assert saved(tmp_path) == ["step-2", "step-3"]


def test_a_save_that_was_due_is_made_up_for_at_the_next_good_step(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_skipped_updates": 4}
    trainer(tmp_path, reward=bad_in(2, 3), max_steps=5, **options).train()
    assert saved(tmp_path) == ["step-4", "step-5"]  # of steps 2 and 4; of the last


class StopIn(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, *_, **__):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_told_to_stop_meanwhile_it_keeps_its_place_and_what_was_good(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_skipped_updates": 4}
    run = trainer(tmp_path, reward=bad_in(3), max_steps=9, given={"callbacks": [StopIn(3)]}, **options)
    run.train()
    assert run.stopped
    assert saved(tmp_path) == ["step-2", "step-3"]
    again = trainer(tmp_path, reward=bad_in(1, 2), max_steps=9, **options)
    assert again.checkpoints.load(True)[0] == 3
    assert again.learner.skips.in_a_row == 1
