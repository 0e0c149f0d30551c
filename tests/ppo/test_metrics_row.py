"""A row of metrics against numbers worked by hand; what lies beside the responses plays no part in it."""

import dataclasses

import pytest
import torch
from test_learner import experience, select, update
from test_rollout import MASK, config, rollout
from torch import tensor

from rlhf.ppo import metrics
from rlhf.ppo.advantages import Advantages
from rlhf.ppo.learner import Statistics, Update
from rlhf.ppo.metrics import logged_means, metrics_row, rollout_means, rollout_sums
from rlhf.ppo.rollout import Rollout
from rlhf.reward.calls import Logged

ARGS = config(missing_eos_penalty=1.5, kl_estimator="k1")
# KL of the tokens of test_rollout's responses: 0.5, 0, -1; 2; 0, 0.5. Together 2, and 2.066679 by k3.
EXPECTED = {
    "objective/kl": 2 / 3,
    "objective/kl_per_token": 2 / 6,
    "objective/kl_k1_per_token": 2 / 6,
    "objective/kl_k3_per_token": 2.066679 / 6,
    "objective/kl_exact_per_token": 0.25,
    "objective/entropy": 6 / 3,
    "objective/scores": 0.5,  # of 2, -1, 0.5
    "objective/scores_std": 1.5**0.5,
    "objective/response_length": 2.0,
    "objective/eos_rate": 2 / 3,
    "rewards/judge/mean": 0.5,
    "rewards/judge/std": 1.5**0.5,
    "objective/kl_coef": 0.1,
    "objective/non_score_reward": -0.2 / 3,
    "objective/penalised_scores": 0.0,  # the third was cut: 1.5 less
    "objective/rlhf_reward": -0.2 / 3,
    "objective/advantages": 3.5,  # of 1 to 6
    "objective/advantages_std": (35 / 12) ** 0.5,
    "objective/returns": 2.0,  # of 1, 1, 1, 3, 3, 3
    "objective/returns_std": 1.0,
    "objective/values": 0.35,  # of 0.1 to 0.6
    "value/explained_variance": 1 - (20.71 / 6 - 1.65**2),  # errors 0.9, 0.8, 0.7, 2.6, 2.5, 2.4
    "policy/approxkl_avg": 0.25,
    "policy/clipfrac_avg": 0.5,
    "policy/entropy_avg": 1.5,
    "policy/grad_norm": 7.0,
    "value/grad_norm": 8.0,
    "loss/policy_avg": -2 / 4,
    "loss/value_avg": 4 / 4,
    "val/clipfrac_avg": 0.75,
    "val/ratio": 1.25,
    "val/ratio_var": 0.4375,
    "val/ratio_max": 3.0,
    "val/num_eos_tokens": 2.0,
    "val/updates": 3.0,
    "val/skipped_updates": 1.0,
    "val/all_responses_same": 0.0,
}
# Of five minibatches one was left out and one held back: its sums count. Sums over this rank, norms and counts.
LEARNED = {"policy_loss": -2.0, "value_loss": 4.0, "approxkl": 3.0, "clipfrac": 6.0, "value_clipfrac": 9.0}
LEARNED |= {"entropy": 18.0, "ratio": 15.0, "ratio_squared": 24.0, "tokens": 12.0, "ratio_max": 3.0}
COUNTS = {"minibatches": 5, "updates": 3, "skipped": 1, "grad_norm": 7.0, "grad_norm_critic": 8.0}


class Rank:
    def __init__(self, index=0, world=1):
        self.process_index, self.num_processes = index, world


def targets():
    advantages = tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [5.0, 6.0, 0.0]])
    returns = tensor([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0], [3.0, 3.0, 0.0]])
    # KL times -0.1, the score on the last token, 1.5 less where the response is truncated.
    rewards = tensor([[-0.05, 0.0, 2.1], [-1.2, 9.0, 9.0], [0.0, -1.05, 9.0]])
    return Advantages(advantages - 3.5, returns, advantages, rewards, tensor([2.0, -1.0, -1.0]))


def learned(share=1.0, ratio_max=LEARNED["ratio_max"]):
    sums = {name: tensor(value * share, dtype=torch.float64) for name, value in LEARNED.items()}
    statistics = Statistics(**{name: sums[name] for name in Statistics._fields})
    norms = tensor([COUNTS["grad_norm"], COUNTS["grad_norm_critic"]], dtype=torch.float64)
    largest = tensor(ratio_max, dtype=torch.float64)
    return Update(
        statistics, 12 * share, largest, norms, COUNTS["minibatches"], COUNTS["updates"], COUNTS["skipped"], []
    )


def row_of(one, aims, rank=None, *update):
    return metrics_row(one, aims, learned(*update), 0.1, ARGS, rank or Rank(), {})


def junk(one, extra):
    """The record with 99 in every place beside the responses, and in as many more columns."""
    wide, mask = {}, torch.cat([MASK, torch.zeros(3, extra, dtype=torch.bool)], 1)
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if isinstance(value, torch.Tensor) and value.shape == MASK.shape and value.is_floating_point():
            value = torch.cat([value, torch.zeros(3, extra)], 1).where(mask, tensor(99.0))
        wide[field.name] = value
    if isinstance(one, Rollout):
        wide |= {"mask": mask, "ids": torch.cat([one.ids, torch.full((3, extra), 99)], 1)}
    return type(one)(**wide)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(metrics, "all_sum", lambda _, values: values)


def test_every_number_of_a_row_by_hand(alone):
    row = row_of(rollout(), targets())
    assert row.keys() == EXPECTED.keys()
    assert row == pytest.approx(EXPECTED, abs=1e-6)


@pytest.mark.parametrize("extra", [0, 30])
def test_what_lies_beside_a_response_is_not_seen(alone, extra):
    wide, aims = junk(rollout(), extra), junk(targets(), extra)
    assert (wide.logp == 99).sum() == 3 + 3 * extra
    assert row_of(wide, aims) == pytest.approx(EXPECTED, abs=1e-6)
    sums = {name: value.item() for name, value in rollout_sums(wide, "k1").items()}
    means = rollout_means(sums, ["judge"])  # what an evaluation logs
    assert means == pytest.approx({name: EXPECTED[name] for name in means}, abs=1e-6)


def test_a_filler_row_and_a_missing_opinion_are_not_seen(alone):
    real = tensor([True, True, False])
    scores = tensor([[2.0, float("nan")], [-1.0, 4.0], [50.0, 50.0]])
    rows = {"is_valid": real, "mask": MASK & real.unsqueeze(1), "ended": tensor([True, False, True])}
    one = rollout(scores=scores, reward_names=["judge", "rule"], **rows)
    sums = {name: value.item() for name, value in rollout_sums(one, "k1").items()}
    means = rollout_means(sums, ["judge", "rule"])
    assert (means["objective/scores"], means["objective/response_length"], means["objective/kl"]) == (0.5, 2.0, 0.75)
    assert (means["objective/eos_rate"], means["rewards/judge/mean"], means["rewards/rule/mean"]) == (0.5, 0.5, 4.0)
    row = row_of(one, targets())  # the scores of the other two, of 2 and -1
    assert (row["objective/penalised_scores"], row["val/num_eos_tokens"]) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("responses", "same"),
    [
        ([[7, 8], [7, 8], [7, 8]], 1.0),
        ([[7, 8], [7, 8], [8, 7]], 0.0),  # an order is a difference
        ([[7], [7, 7], [7]], 0.0),
        ([[0], [0, 0], [0]], 0.0),
        ([[7, 8], [7, 8], [7, 9]], 0.0),
    ],
)
def test_whether_all_responses_are_the_same(alone, responses, same):
    """Beside the responses lie a prompt and padding that differ."""
    mask = tensor([[True] * len(row) + [False] * (3 - len(row)) for row in responses])
    ids = tensor([[i, i, *row, *[50 + i] * (3 - len(row))] for i, row in enumerate(responses)])
    assert row_of(rollout(ids=ids, mask=mask), targets())["val/all_responses_same"] == same
    filler = rollout(ids=ids, mask=mask, is_valid=tensor([True, True, False]))  # the first two
    assert row_of(filler, targets())["val/all_responses_same"] == float(responses[0] == responses[1])
    one = rollout(ids=ids, mask=mask, is_valid=tensor([True, False, False]))
    assert row_of(one, targets())["val/all_responses_same"] == 0.0  # of one there is nothing to say


def test_a_row_of_two_ranks_is_that_of_one(monkeypatch):
    shards = [tensor([0, 2]), tensor([1])]

    def rank_of(index):
        one, aims = (type(whole)(**select(whole, shards[index])) for whole in (rollout(), targets()))
        return row_of(one, aims, Rank(index, 2), *((0.75, 2.0), (0.25, 3.0))[index])

    sent = []
    monkeypatch.setattr(metrics, "all_sum", lambda _, values: (sent.append(values), values)[1])
    for index in range(2):  # first for what each would send, then with the sum of both
        rank_of(index)
    monkeypatch.setattr(metrics, "all_sum", lambda *_: sent[0] + sent[1])
    for index in range(2):
        assert rank_of(index) == pytest.approx(EXPECTED, abs=1e-6)


@pytest.mark.parametrize("size", [8, 2])
def test_what_learning_sums_up_does_not_see_padding(size):
    """Ids, old log-probs, values and targets beside short responses, and beside prompts, are replaced by others."""
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    rows, aims = experience()
    clean = update(rows, aims, **options)
    outside = {
        name: torch.where(rows.mask, getattr(rows, name), 20.0)
        for name in ("logp", "ref_logp", "entropy", "exact_kl", "values")
    }
    outside["ids"] = torch.where(rows.attention, rows.ids, 33)
    per_token = ("advantages", "returns", "raw_advantages", "rewards")
    noisy = {name: torch.where(rows.mask, getattr(aims, name), 20.0) for name in per_token}
    other = update(dataclasses.replace(rows, **outside), dataclasses.replace(aims, **noisy), **options)
    assert 0 < (~rows.mask).sum() < rows.mask.numel()
    assert {n: float(v) for n, v in other[3].items()} == pytest.approx({n: float(v) for n, v in clean[3].items()})
    for one, two in zip(clean[1], other[1], strict=True):
        for name, gradient in one.items():
            torch.testing.assert_close(two[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("estimator", "kl"), [("k1", 2.0), ("k3", 2.066679)])
def test_kl_is_of_the_estimator_that_was_asked_for(alone, estimator, kl):
    args = config(kl_estimator=estimator)
    row = metrics_row(rollout(), targets(), learned(), 0.1, args, Rank(), {})
    assert row["objective/kl"] == pytest.approx(kl / 3)
    assert row["objective/kl_per_token"] == pytest.approx(kl / 6)
    assert row["objective/non_score_reward"] == pytest.approx(-0.1 * kl / 3)
    assert row["objective/kl_k1_per_token"] == pytest.approx(2 / 6)


def test_a_spread_that_is_small_beside_the_mean_is_not_lost(alone):
    """Squares of 10,000 take 27 bits, a float32 has 24."""
    scores = tensor([9999.0, 10001.0, 10000.0])
    aims = dataclasses.replace(targets(), returns=torch.where(MASK, 10000 + targets().returns, 0))
    row = row_of(rollout(raw_score=scores, scores=scores.unsqueeze(1)), aims)
    for name in ("objective/scores_std", "rewards/judge/std"):
        assert row[name] == pytest.approx((2 / 3) ** 0.5, abs=1e-4)
    assert row["objective/returns_std"] == pytest.approx(1.0, abs=1e-4)  # of 1, 1, 1, 3, 3, 3 more


def test_what_functions_log_is_a_mean_over_all_batches():
    batches = [Logged({"right": [1.0, 3.0]}), Logged({"right": [8.0], "once": [5.0]}), Logged()]
    assert logged_means(3, batches) == {"right": 4.0, "once": 5.0}
    assert logged_means(0, []) == {}
