"""Rewards and advantages on a ragged batch, by hand."""

import dataclasses

import pytest
import tiny
import torch
from torch import tensor
from torch.testing import assert_close

from rlhf.config import PPOConfig
from rlhf.models.actor_critic import ActorCritic, FrozenRoles
from rlhf.ppo.rollout import Rollout, judge, observe, pack, token_rewards

MASK = tensor([[True, True, True], [True, False, False], [True, True, False]])


def rollout(**fields):
    base = {
        "ids": torch.zeros(3, 5, dtype=torch.long),
        "attention": torch.ones(3, 5, dtype=torch.bool),
        "mask": MASK,
        "ended": tensor([True, True, False]),
        "real": tensor([True, True, True]),
        "logp": tensor([[-1.0, -2.0, -3.0], [-1.0, 9.0, 9.0], [-0.5, -0.5, 9.0]]),
        "ref_logp": tensor([[-1.5, -2.0, -2.0], [-3.0, 9.0, 9.0], [-0.5, -1.0, 9.0]]),
        "entropy": torch.ones(3, 3),
        "values": tensor([[0.1, 0.2, 0.3], [0.4, 9.0, 9.0], [0.5, 0.6, 9.0]]),
        "score": tensor([2.0, -1.0, 0.5]),
    }
    return Rollout(**base | fields)


def config(**options):
    return PPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, **options)


def test_score_once_on_the_last_token_and_kl_on_every_one():
    # kl: [0.5, 0, -1], [2], [0, 0.5]; times -0.1, and the score on the last response token
    expected = tensor([[-0.05, 0.0, 2.1], [-1.2, 0.0, 0.0], [0.0, 0.45, 0.0]])
    assert_close(token_rewards(rollout(), 0.1, config()), expected)


def test_missing_eos_penalty_hits_the_cut_response_only():
    difference = token_rewards(rollout(), 0.1, config()) - token_rewards(
        rollout(), 0.1, config(missing_eos_penalty=1.5)
    )
    assert_close(difference, tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.5, 0.0]]))


def test_advantages_are_standardised_over_all_response_tokens():
    targets = judge(rollout(), 0.1, config(), lambda x: x)
    on = targets.advantages[MASK]
    assert on.mean().item() == pytest.approx(0, abs=1e-6)
    assert on.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (targets.advantages[~MASK] == 0).all()


def test_advantages_do_not_depend_on_the_sharding():
    whole = judge(rollout(), 0.1, config(), lambda x: x)
    shards = [tensor([0, 2]), tensor([1])]
    parts = [Rollout(**{f.name: getattr(rollout(), f.name)[i] for f in dataclasses.fields(Rollout)}) for i in shards]
    sums: list[torch.Tensor] = []
    for part in parts:  # first round: what each rank would send
        judge(part, 0.1, config(), lambda x: (sums.append(x), x)[1])
    for index, part in zip(shards, parts, strict=True):  # second round: with what all of them sent
        assert_close(judge(part, 0.1, config(), lambda _: sums[0] + sums[1]).advantages, whole.advantages[index])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_rewards_add_up_to_score_less_kl(estimator):
    one = rollout()
    difference = torch.where(MASK, one.logp - one.ref_logp, 0).double()
    kl = {"k1": difference, "k3": (-difference).exp() - 1 + difference}[estimator]
    rewards = token_rewards(one, 0.1, config(kl_estimator=estimator))
    assert_close(rewards.sum(1).double(), one.score.double() - 0.1 * kl.sum(1), atol=1e-6, rtol=1e-6)
    assert (rewards[~MASK] == 0).all()


def test_filler_rows_earn_nothing():
    real = tensor([True, False, True])
    filler = rollout(real=real, mask=MASK & real.unsqueeze(1), ended=tensor([True, False, False]))
    rewards = token_rewards(filler, 0.1, config(missing_eos_penalty=1.5))
    assert (rewards[1] == 0).all()
    assert (judge(filler, 0.1, config(), lambda x: x).advantages[1] == 0).all()


@pytest.mark.parametrize("whiten", [False, True])
def test_pad_columns_change_nothing(whiten):
    args = config(whiten_rewards=whiten)
    wide = {
        name: torch.cat([getattr(rollout(), name), torch.full((3, 4), 9.0)], 1)
        for name in ("logp", "ref_logp", "entropy", "values")
    }
    wide["mask"] = torch.cat([MASK, torch.zeros(3, 4, dtype=torch.bool)], 1)
    narrow, padded = (judge(one, 0.1, args, lambda x: x) for one in (rollout(), rollout(**wide)))
    for name in ("advantages", "returns"):
        assert_close(getattr(padded, name)[:, :3], getattr(narrow, name), atol=1e-6, rtol=1e-6)
        assert (getattr(padded, name)[:, 3:] == 0).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_observing_in_chunks_gives_the_same_numbers(family):
    policy, other, critic, reward = {
        "gpt2": (tiny.gpt2(0), tiny.gpt2(2), tiny.gpt2_reward(1), tiny.gpt2_reward(3)),
        "llama": (tiny.llama(0), tiny.llama(2), tiny.llama_reward(1), tiny.llama_reward(3)),
    }[family]
    models = ActorCritic(policy, critic, temperature=0.7), FrozenRoles(policy, critic, other, reward)
    prompts = [list(range(3, 3 + n)) for n in (9, 1, 4, 6, 2)]
    responses = [list(range(50, 50 + n)) for n in (1, 7, 3, 7, 2)]
    packed = pack(prompts, responses, 2, torch.device("cpu"))
    flags = {"ended": tensor([True, False, True, False, True]), "real": tensor([True] * 4 + [False])}
    seen = [
        observe(*models, packed, **flags, args=config(local_rollout_forward_batch_size=size, temperature=0.7))
        for size in (5, 3, 1)
    ]
    assert seen[0].mask.sum(1).tolist() == [1, 7, 3, 7, 0]
    assert len(set(seen[0].score.tolist())) == 5
    for part in seen[1:]:
        for field in dataclasses.fields(Rollout):
            assert_close(getattr(part, field.name), getattr(seen[0], field.name), atol=1e-5, rtol=1e-5)
