"""Numbers that are not finite change nothing: the optimizer step is left out, and at some point the run ends."""

import json
import math

import pytest
import torch
from test_learner import Rank, assert_same, experience, update
from tiny_ppo import trainer
from transformers import TrainerCallback

from rlhf.errors import UserError
from rlhf.ppo import learner as module
from rlhf.ppo.learner import within_tokens


def test_a_gradient_that_is_not_finite_takes_no_step():
    rows, targets = experience()
    targets.advantages[3, 0] = math.inf
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "num_mini_batches": 8}
    roles, steps, _, sums = update(rows, targets, learning_rate=0.1, **options)
    assert len(steps) == 7  # all but the row's own
    assert (sums["minibatches"], sums["updates"], sums["skipped"]) == (8, 7, 1)
    assert all(parameter.isfinite().all() for parameter in roles.parameters())


def test_too_many_in_a_row_end_the_run():
    rows, targets = experience()
    targets.advantages[:] = math.nan
    options = {"num_ppo_epochs": 5, "max_skipped_updates": 3, "per_device_train_batch_size": 8}
    with pytest.raises(UserError, match="expected a finite norm, found none 3 times in a row, last in step 1"):
        update(rows, targets, **options)


def test_the_largest_ratio_is_that_of_the_worst_token():
    rows, targets = experience()
    _, _, _, sums = update(rows, targets)
    rows.logp[2, 1] -= 5.0  # the policy says e^5 times more now
    _, _, _, again = update(rows, targets)
    assert again["ratio_max"] > 20 * sums["ratio_max"]
    assert sums["ratio_max"] >= sums["ratio"] / sums["tokens"]


def test_an_infinite_score_is_refused_with_its_reward_and_prompt(tmp_path):
    def half(completions, **_):
        return [math.inf if i == 1 else 0.0 for i in range(len(completions))]

    run = trainer(tmp_path, reward=half)
    before = {name: p.clone() for name, p in run.roles.trained.named_parameters()}
    with pytest.raises(UserError, match=r"reward half: expected finite scores, found inf for prompt .+"):
        run.train()
    assert all(torch.equal(p, before[name]) for name, p in run.roles.trained.named_parameters())


class Explode(TrainerCallback):
    def on_step_begin(self, args, state, control, optimizer=None, **_):
        for group in optimizer.param_groups:
            group["lr"] = 1e30


def test_a_learning_rate_that_blows_up_ends_in_words_and_keeps_the_checkpoint(tmp_path):
    options = {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_skipped_updates": 2,
    }
    trainer(tmp_path, max_steps=1, learning_rate=1e-3, **options).train()
    run = trainer(tmp_path, max_steps=9, learning_rate=1e-3, **options)
    run.add_callback(Explode)
    with pytest.raises(UserError, match="a lower learning rate"):
        run.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoints" / "step-1").is_dir()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["val/skipped_updates"] == 0


def test_micro_batches_by_tokens_do_not_change_the_update():
    options = {"num_mini_batches": 2, "num_ppo_epochs": 2, "learning_rate": 0.1}
    whole = update(per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    packed = update(per_device_train_batch_size=4, gradient_accumulation_steps=2, micro_batch_tokens=20, **options)
    assert len({len(rows) for rows in packed[2]}) > 1  # short rows share a pass, long ones do not
    for one, other in zip(whole[1], packed[1], strict=True):
        assert_same(one, other)
    assert_same(whole[0].state_dict(), packed[0].state_dict())


def test_no_group_exceeds_its_tokens():
    rows, _ = experience()
    order = rows.attention.sum(1).argsort()
    groups = within_tokens(rows, order, 24)
    assert torch.cat(groups).tolist() == order.tolist()
    prompt = rows.attention.shape[1] - rows.mask.shape[1]
    for group in groups:
        width = rows.attention[group, :prompt].sum(1).max() + rows.mask[group].sum(1).max()
        assert len(group) == 1 or width * len(group) <= 24
    assert [len(group) for group in within_tokens(rows, order, 1)] == [1] * 8


def test_ranks_do_as_many_passes_as_the_one_with_most(monkeypatch):
    monkeypatch.setattr(module, "all_max", lambda _, count: count + 3)
    rows, targets = experience()
    places = torch.arange(8) * 2
    monkeypatch.setattr(module, "all_sum", lambda _, x: x.double())
    options = {"micro_batch_tokens": 1000, "per_device_train_batch_size": 8}
    _, steps, passes, sums = update(rows, targets, places=places, n_global=16, rank=Rank(0, 2), **options)
    assert [len(rows) for rows in passes] == [8, 1, 1, 1]  # three with a row that counts for nothing
    assert sums["tokens"] == rows.mask.sum()
    assert len(steps) == 1
