"""Scores as PPO learns from them, by hand."""

import pytest
import tiny
import torch
from tiny_ppo import trainer
from torch import tensor
from torch.testing import assert_close

from rlhf.config import PPOConfig
from rlhf.errors import UserError
from rlhf.generation.decode import generate, uniforms
from rlhf.ppo.advantages import ScoreScaler
from rlhf.ppo.prompts import read_prompts

ALL = tensor([True, True])


def scaler(**options):
    return ScoreScaler(PPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, **options))


def alone(sums):
    return sums


def test_off_by_default():
    assert_close(scaler()(tensor([3.0, -200.0]), ALL, alone), tensor([3.0, -200.0]))


def test_the_reference_gets_mean_0_and_deviation_1():
    one = scaler()
    raw = tensor([1.0, 3.0, 100.0])
    found = one.fit(raw, tensor([True, True, False]), alone)  # the last is filler
    assert found == (2.0, 1.0)
    assert_close(one(tensor([5.0, 2.0]), ALL, alone), tensor([3.0, 0.0]))


def test_running_scaling_and_norm():
    one, normed = scaler(use_score_scaling=True), scaler(use_score_scaling=True, use_score_norm=True)
    # First batch 1, 3: mean 2, deviation 1. Both batches 1, 3, 5, 7: mean 4, deviation sqrt(5).
    assert_close(one(tensor([1.0, 3.0]), ALL, alone), tensor([1.0, 3.0]))
    assert_close(one(tensor([5.0, 7.0]), ALL, alone), tensor([5.0, 7.0]) / 5**0.5)
    assert_close(normed(tensor([1.0, 3.0]), ALL, alone), tensor([-1.0, 1.0]))
    assert_close(normed(tensor([5.0, 7.0]), ALL, alone), tensor([1.0, 3.0]) / 5**0.5)


def test_running_scaling_is_of_what_the_reference_s_moments_leave():
    one = scaler(use_score_scaling=True, use_score_norm=True)
    one.fit(tensor([2.0, 6.0]), ALL, alone)  # mean 4, deviation 2
    # 8 and 10 are 2 and 3: mean 2.5, deviation 0.5. With 12 and 14, which are 4 and 5: mean 3.5, deviation sqrt(1.25).
    assert_close(one(tensor([8.0, 10.0]), ALL, alone), tensor([-1.0, 1.0]))
    assert_close(one(tensor([12.0, 14.0]), ALL, alone), tensor([0.5, 1.5]) / 1.25**0.5)


def test_clip_comes_last():
    one = scaler(score_clip=1.5)
    one.fit(tensor([1.0, 3.0]), ALL, alone)
    assert_close(one(tensor([5.0, 1.0]), ALL, alone), tensor([1.5, -1.0]))
    assert_close(one(tensor([-3.0, 3.0]), ALL, alone), tensor([-1.5, 1.0]))


def test_moments_are_those_of_all_ranks():
    one = scaler(use_score_scaling=True)
    # The other rank adds the scores 5 and 7.
    found = one(tensor([1.0, 3.0]), ALL, lambda sums: sums + tensor([2.0, 12.0, 74.0], dtype=sums.dtype))
    assert_close(found, tensor([1.0, 3.0]) / 5**0.5)


def test_a_checkpoint_brings_it_back():
    one = scaler(use_score_scaling=True, use_score_norm=True)
    one.fit(tensor([1.0, 5.0]), ALL, alone)  # mean 3, deviation 2
    one(tensor([1.0, 3.0]), ALL, alone)
    other = scaler(use_score_scaling=True, use_score_norm=True)
    other.load_state_dict(one.state_dict())
    batch = tensor([4.0, 9.0])
    assert_close(other(batch, ALL, alone), one(batch, ALL, alone))


@pytest.mark.parametrize("widest", [torch.float64, torch.float32])
@pytest.mark.parametrize("value", [0.0, -1.0, 0.3, 0.1, 7.3])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_equal_scores_have_no_scale(value, rows, widest, monkeypatch):
    """Nothing is divided by a deviation of 0, or by what rounding leaves of one, until there is a spread.

    Apple's GPUs have no float64: sums in float32 leave more of it.
    """
    monkeypatch.setattr("rlhf.functional.gae.widest", lambda device: widest)
    equal, all_rows = torch.full((rows,), value), torch.ones(rows, dtype=torch.bool)
    one = scaler(use_score_scaling=True)
    assert_close(one(equal, all_rows, alone), equal)
    assert_close(scaler(use_score_scaling=True, use_score_norm=True)(equal, all_rows, alone), torch.zeros(rows))
    more = tensor([value + 2.0] * rows)  # half at value, half 2 above: deviation 1
    assert_close(one(more, all_rows, alone), more, rtol=1e-4, atol=1e-5)
    fitted = scaler()
    fitted.fit(equal, all_rows, alone)
    assert_close(fitted(more, all_rows, alone), torch.full((rows,), 2.0))


def scaled(run, step, prompts):
    return run.compute_advantages(run.collect(step, prompts), run.scaler).score


def test_unseen_prompts_have_mean_0_and_deviation_1_before_ppo(tmp_path):
    """As many as were fitted: the mean of 256 alone has a standard error of 0.06, that of 4096 one of 0.02."""
    ids = torch.randint(10, 400, (8192, 4), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "prompt_id": str(i)} for i, row in enumerate(ids)]
    run = trainer(tmp_path, rows=rows[:4096], score_norm_samples=4096, max_steps=1, gradient_accumulation_steps=256)
    run._begin(0)
    unseen = read_prompts(rows[4096:], run.processing_class)
    scores = torch.cat([scaled(run, 1, unseen[i : i + 512]) for i in range(0, 4096, 512)])
    assert len(scores) == 4096
    assert abs(scores.mean()) < 0.05
    assert abs(scores.std() - 1) < 0.05


def test_the_reference_answers_and_each_reward_has_its_weight(tmp_path):
    def first(completion_ids, **_):
        return [float(ids[0]) for ids in completion_ids]

    def length(completion_ids, **_):
        return [float(len(ids)) for ids in completion_ids]

    given = {"ref_model": tiny.llama(4), "value_model": tiny.llama_reward()}
    run = trainer(tmp_path, reward=[first, length], reward_weights=[2.0, -3.0], given=given)
    found, is_valid = run.collector.score_reference(run.prompts)
    u = uniforms(5, 0, [prompt.stream for prompt in run.prompts], 6)
    ids = [prompt.input_ids for prompt in run.prompts]
    said, other = (generate(model, ids, u, run.collector.eos_ids, 0.7) for model in (tiny.llama(4), tiny.llama()))
    assert said != other
    assert found.tolist() == [2.0 * row[0] - 3.0 * len(row) for row in said]
    assert is_valid.all()


def test_a_spread_that_is_small_beside_the_mean_is_a_scale():
    raw = tensor([9999.0, 10001.0])
    one, running = scaler(), scaler(use_score_scaling=True, use_score_norm=True)
    assert one.fit(raw, ALL, alone) == pytest.approx((10000.0, 1.0), abs=1e-6)
    assert_close(one(raw, ALL, alone), tensor([-1.0, 1.0]))
    assert_close(running(raw, ALL, alone), tensor([-1.0, 1.0]))


def test_what_is_found_of_the_reference_is_told_as_it_is():
    assert scaler().fit(tensor([3.0, 3.0]), ALL, alone) == (3.0, 0.0)  # although nothing is divided by 0
    with pytest.raises(
        UserError, match=r"^score_norm_samples: expected finite scores, found mean inf and deviation na"
    ):
        scaler().fit(tensor([3.0, float("inf")]), ALL, alone)
