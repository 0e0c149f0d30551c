"""Rewards and advantages on a ragged batch, by hand."""

import dataclasses

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from rlhf.config import PPOConfig
from rlhf.ppo.rollout import Rollout, judge, token_rewards

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
