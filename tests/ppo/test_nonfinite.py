"""Numbers that are not finite change nothing: the optimizer step is left out, and at some point the run ends."""

import json
import math

import pytest
import tiny
import torch
from test_learner import LENGTHS, Rank, assert_same, experience, update
from tiny_ppo import PROMPTS, metrics, trainer
from transformers import TrainerCallback

from rlhf.errors import UserError
from rlhf.functional.batching import passes_of
from rlhf.ppo import learner as module


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
    with pytest.raises(UserError, match="loss and gradient not finite 3 times in a row, last in step 1"):
        update(rows, targets, **options)


def test_updates_that_are_skipped_now_and_then_end_no_run():
    """One of three minibatches in each of three passes: three in all, and never three in a row."""
    rows, targets = experience(3)
    targets.advantages[1, 0] = math.inf
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "num_mini_batches": 3}
    _, _, _, sums = update(rows, targets, num_ppo_epochs=3, max_skipped_updates=3, **options)
    assert (sums["updates"], sums["skipped"]) == (6, 3)


def test_the_largest_ratio_is_that_of_the_worst_token():
    rows, targets = experience()
    _, _, _, sums = update(rows, targets)
    rows.logp[2, 1] -= 5.0  # the policy says e^5 times more now
    _, _, _, again = update(rows, targets)
    assert again["ratio_max"] > 20 * sums["ratio_max"]
    assert sums["ratio_max"] >= sums["ratio"] / sums["tokens"]


def test_a_loss_that_is_not_finite_takes_no_step_though_its_gradient_is():
    """A return of 2e19: its squared error is over float32's 3.4e38, its gradient is 2e19 over the tokens."""
    rows, targets = experience()
    targets.returns[3, 0] = 2e19
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "num_mini_batches": 8}
    _, steps, _, sums = update(rows, targets, learning_rate=0.1, **options)
    assert len(steps) == 7
    assert sums["skipped"] == 1
    assert sums["tokens"] == rows.mask.sum() - LENGTHS[3]  # what was left out is in no mean
    assert all(math.isfinite(number) for number in sums.values())


def lines(folder, name="skipped.jsonl"):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / name).read_text().splitlines()]


def policy_of(run):
    return torch.cat([p.detach().flatten().clone() for p in run.roles.trained.parameters()])


def watched(run):
    """Whether each step moved the weights, by step."""
    moved, step = {}, run._finish_step

    def noted(number, rollout):
        before = policy_of(run)
        row = step(number, rollout)
        moved[number] = not torch.equal(before, policy_of(run))
        return row

    run._finish_step = noted
    return moved


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_model_score_that_is_not_finite_is_left_out_and_logged(tmp_path, capsys, bad):
    options = {"max_steps": 4, "use_score_scaling": True, "kl_target": 0.05, "save_strategy": "no"}
    run = trainer(tmp_path, **options)
    score, calls = run.collector.score, []

    def second_is_bad(*given):
        calls.append(given[0])
        found = score(*given)
        if len(calls) == 2:
            found.scores[1, 0] = bad
        return found

    run.collector.score = second_is_bad
    moved, coefficients = watched(run), []

    class Note(TrainerCallback):
        def on_step_end(self, *_, **__):
            coefficients.append(run.kl_control.kl_coef)

    run.add_callback(Note)
    run.train()
    assert moved == {1: True, 2: False, 3: True, 4: True}
    rows = metrics(tmp_path)
    assert [row["val/skipped_updates"] for row in rows] == [0, 1, 0, 0]
    assert [row["val/updates"] for row in rows] == [2, 0, 2, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())  # the other rows' means
    assert coefficients[0] == coefficients[1] != coefficients[2]
    (line,) = lines(tmp_path)
    (row,) = line.pop("rows")
    assert line == {"step": 2, "not_finite": ["score"], "in_a_row": 1}
    prompt = calls[1][1]
    assert row["prompt_id"] == prompt.prompt_id
    assert row["prompt_tokens"] == len(prompt.input_ids)
    assert 1 <= row["response_tokens"] <= 6
    assert row["not_finite"] == ["score"]
    ((reward, score),) = row["scores"].items()
    assert score == str(bad)
    said = f"step 2: update skipped: score not finite, prompts {prompt.prompt_id} ({reward} {bad});"
    assert said in capsys.readouterr().out


def test_no_opinion_of_a_function_is_no_number_gone_wrong(tmp_path):
    run = trainer(tmp_path, reward=lambda completions, **_: [None, *[1.0] * (len(completions) - 1)], max_steps=2)
    moved = watched(run)
    run.train()
    assert moved == {1: True, 2: True}
    assert not (tmp_path / "skipped.jsonl").exists()


def test_nan_of_a_function_is_not_taken_for_no_opinion(tmp_path):
    """Learned as a score of 0 it would be worth more than a bad response."""

    def half(completions, **_):
        return [math.nan if i == 1 else None if i == 2 else -1.0 for i in range(len(completions))]

    run = trainer(tmp_path, reward=half, max_skipped_updates=2, max_steps=9)
    before = policy_of(run)
    with pytest.raises(UserError, match=r"score not finite 2 times in a row, last in step 2"):
        run.train()
    assert torch.equal(policy_of(run), before)
    for line in lines(tmp_path):
        (row,) = line["rows"]
        assert (row["not_finite"], row["scores"]) == (["score"], {"half": "inf"})


def test_an_infinite_score_is_refused_with_its_reward_and_prompt(tmp_path):
    def half(completions, **_):
        return [math.inf if i == 1 else 0.0 for i in range(len(completions))]

    run = trainer(tmp_path, reward=half, max_skipped_updates=3, max_steps=9, save_strategy="steps", save_steps=2)
    before = policy_of(run)
    with pytest.raises(
        UserError, match=r"score not finite 3 times in a row, last in step 3 with prompts \w+ \(half inf\); check"
    ):
        run.train()
    assert torch.equal(policy_of(run), before)
    assert [line["in_a_row"] for line in lines(tmp_path)] == [1, 2, 3]
    assert not (tmp_path / "checkpoints").exists()


def test_an_evaluation_leaves_out_what_is_not_finite_and_counts_it(tmp_path):
    def half(completions, **_):
        return [math.inf if i % 2 else 1.0 for i in range(len(completions))]

    held_out = [{"prompt": row["prompt"]} for row in PROMPTS[:4]]
    run = trainer(tmp_path, reward=half, given={"eval_dataset": held_out}, per_device_eval_batch_size=4)
    found = run.evaluate()
    assert (found["eval/not_finite"], found["eval/scores"], found["eval/scores_std"]) == (2, 1.0, 0.0)
    assert all(math.isfinite(value) for value in found.values())


def test_a_broken_policy_ends_the_run(tmp_path):
    policy = tiny.llama()
    policy.model.norm.weight.data[0] = math.nan
    run = trainer(tmp_path, given={"model": policy, "ref_model": tiny.llama()}, max_skipped_updates=2)
    with pytest.raises(UserError, match="log-prob not finite 2 times in a row, last in step 2"):
        run.train()
    for line in lines(tmp_path):
        assert len(line["rows"]) in (3, 4)  # of 7 prompts in fours, all that a step had
        assert all((row["not_finite"], row["logp"]) == (["log-prob"], "nan") for row in line["rows"])


def test_the_batch_of_a_gradient_that_is_not_finite_is_logged(tmp_path):
    run = trainer(tmp_path, max_steps=2, num_ppo_epochs=1, num_mini_batches=2, critic_warmup_steps=1)
    compute, seen = run.compute_advantages, []

    def far_off(rollout, scaler):
        targets = compute(rollout, scaler)
        seen.append(rollout)
        if len(seen) == 2:
            targets.returns[0, 0] = 2e19
        return targets

    run.compute_advantages = far_off
    moved = watched(run)
    run.train()
    assert moved == {1: True, 2: True}  # the other minibatch took its step
    (line,) = lines(tmp_path)
    assert (line["step"], line["not_finite"]) == (2, ["loss", "gradient"])
    bad = [row for row in line["rows"] if row["return"] == pytest.approx(2e19)]
    assert len(bad) == 1
    assert bad[0]["value_loss"] == "inf"
    assert isinstance(bad[0]["policy_loss"], float)
    assert all(isinstance(row["score"], float) for row in line["rows"])
    assert metrics(tmp_path)[1]["val/skipped_updates"] == 1


def test_scores_of_the_reference_are_to_be_finite(tmp_path):
    run = trainer(tmp_path, reward=lambda completions, **_: [math.inf] * len(completions), score_norm_samples=4)
    with pytest.raises(UserError, match="score_norm_samples: expected finite scores, found mean inf"):
        run.train()


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
    with pytest.raises(UserError, match="a lower learning_rate"):
        run.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoints" / "step-1").is_dir()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["val/skipped_updates"] == 0


def test_micro_batches_by_tokens_do_not_change_the_update():
    options = {"num_mini_batches": 2, "num_ppo_epochs": 2, "learning_rate": 0.1}
    whole = update(per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    packed = update(per_device_train_batch_size=4, gradient_accumulation_steps=2, micro_batch_tokens=30, **options)
    assert len({len(rows) for rows in packed[2]}) > 1  # short rows share a pass, long ones do not
    for one, other in zip(whole[1], packed[1], strict=True):
        assert_same(one, other)
    assert_same(whole[0].state_dict(), packed[0].state_dict())


def test_no_group_exceeds_its_tokens():
    lengths = experience()[0].attention.sum(1).tolist()
    groups = passes_of(lengths, 8, "cpu", 24)
    assert sorted(row for group in groups for row in group) == list(range(8))
    assert any(len(group) > 1 for group in groups)
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 24 for group in groups)
    assert [len(group) for group in passes_of(lengths, 8, "cpu", 1)] == [1] * 8


def test_ranks_do_as_many_passes_as_the_one_with_most(monkeypatch):
    monkeypatch.setattr(module, "sum_and_max", lambda _, counts, rounds: (counts, [n + 3 for n in rounds]))
    rows, targets = experience()
    places = range(0, 16, 2)
    options = {"micro_batch_tokens": 1000, "per_device_train_batch_size": 8}
    _, steps, passes, sums = update(rows, targets, places=places, n_global=16, rank=Rank(0, 2), **options)
    assert [len(rows) for rows in passes] == [8, 1, 1, 1]  # three with a row that counts for nothing
    assert sums["tokens"] == rows.mask.sum()
    assert len(steps) == 1
