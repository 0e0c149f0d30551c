"""Rewards and advantages on a ragged batch, by hand."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import tiny
import tiny_ppo
import torch
from obvious import token_values
from torch import tensor
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from rlhf.config import PPOConfig
from rlhf.distributed.collectives import Shard
from rlhf.errors import UserError
from rlhf.generation.decode import Samples
from rlhf.models.actor_critic import ActorCritic, FrozenRole, exact_kl
from rlhf.ppo import rollout as rollout_module
from rlhf.ppo.advantages import compute_advantages, global_moments
from rlhf.ppo.prompts import Prompt
from rlhf.ppo.roles import Roles
from rlhf.ppo.rollout import Rollout, RolloutCollector, compute_logprobs_and_values, find_nonfinite, row_facts

MASK = tensor([[True, True, True], [True, False, False], [True, True, False]])


def rollout(**fields):
    base = {
        "ids": torch.zeros(3, 5, dtype=torch.long),
        "attention": torch.ones(3, 5, dtype=torch.bool),
        "mask": MASK,
        "ended": tensor([True, True, False]),
        "is_valid": tensor([True, True, True]),
        "logp": tensor([[-1.0, -2.0, -3.0], [-1.0, 9.0, 9.0], [-0.5, -0.5, 9.0]]),
        "ref_logp": tensor([[-1.5, -2.0, -2.0], [-3.0, 9.0, 9.0], [-0.5, -1.0, 9.0]]),
        "entropy": torch.ones(3, 3),
        "values": tensor([[0.1, 0.2, 0.3], [0.4, 9.0, 9.0], [0.5, 0.6, 9.0]]),
        "exact_kl": torch.full((3, 3), 0.25),
        "last_value": tensor([0.0, 0.0, 0.7]),
        "scores": tensor([[2.0], [-1.0], [0.5]]),
        "raw_score": tensor([2.0, -1.0, 0.5]),
        "prompts": [],
        "responses": [],
        "shard": Shard(3, 0, 1),
        "reward_names": ["judge"],
    }
    return Rollout(**base | fields)


def config(**options):
    return PPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, **options)


class Doubling(LlamaForCausalLM):
    """Its logits are twice what its output embeddings give."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_a_policy_whose_logits_are_more_than_its_output_embeddings_is_refused_before_training(name, tmp_path):
    with pytest.raises(UserError, match=f"^{name}: logits of a Doubling are more than its output embeddings"):
        tiny_ppo.trainer(tmp_path, given={name: Doubling(tiny.llama().config)})


def rewards_of(one, **options):
    return compute_advantages(one, 0.1, config(**options), lambda x: x).rewards


def part_of(one, index):
    tensors = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
    tensors = {name: x[index] if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
    return Rollout(**tensors)


def test_score_once_on_the_last_token_and_kl_on_every_one():
    # kl: [0.5, 0, -1], [2], [0, 0.5]; times -0.1, and the score on the last response token
    expected = tensor([[-0.05, 0.0, 2.1], [-1.2, 0.0, 0.0], [0.0, 0.45, 0.0]])
    assert_close(rewards_of(rollout()), expected)


def test_missing_eos_penalty_hits_the_cut_response_only():
    difference = rewards_of(rollout()) - rewards_of(rollout(), missing_eos_penalty=1.5)
    assert_close(difference, tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.5, 0.0]]))


def test_advantages_are_standardised_over_all_response_tokens():
    targets = compute_advantages(rollout(), 0.1, config(), lambda x: x)
    on = targets.advantages[MASK]
    assert on.mean().item() == pytest.approx(0, abs=1e-6)
    assert on.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (targets.advantages[~MASK] == 0).all()


def test_advantages_do_not_depend_on_the_sharding():
    whole = compute_advantages(rollout(), 0.1, config(), lambda x: x)
    shards = [tensor([0, 2]), tensor([1])]
    parts = [part_of(rollout(), i) for i in shards]
    sums: list[torch.Tensor] = []
    for part in parts:  # first round: what each rank would send
        compute_advantages(part, 0.1, config(), lambda x: (sums.append(x), x)[1])
    for index, part in zip(shards, parts, strict=True):  # second round: with what all of them sent
        assert_close(
            compute_advantages(part, 0.1, config(), lambda _: sums[0] + sums[1]).advantages, whole.advantages[index]
        )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_rewards_add_up_to_score_less_kl(estimator):
    one = rollout()
    difference = torch.where(MASK, one.logp - one.ref_logp, 0).double()
    kl = {"k1": difference, "k3": (-difference).exp() - 1 + difference}[estimator]
    rewards = rewards_of(one, kl_estimator=estimator)
    assert_close(rewards.sum(1).double(), one.raw_score.double() - 0.1 * kl.sum(1), atol=1e-6, rtol=1e-6)
    assert (rewards[~MASK] == 0).all()


def test_filler_rows_earn_nothing():
    real = tensor([True, False, True])
    filler = rollout(is_valid=real, mask=MASK & real.unsqueeze(1), ended=tensor([True, False, False]))
    rewards = rewards_of(filler, missing_eos_penalty=1.5)
    assert (rewards[1] == 0).all()
    assert (compute_advantages(filler, 0.1, config(), lambda x: x).advantages[1] == 0).all()


@pytest.mark.parametrize("whiten", [False, True])
def test_pad_columns_change_nothing(whiten):
    args = config(whiten_rewards=whiten)
    wide = {
        name: torch.cat([getattr(rollout(), name), torch.full((3, 4), 9.0)], 1)
        for name in ("logp", "ref_logp", "entropy", "exact_kl", "values")
    }
    wide["mask"] = torch.cat([MASK, torch.zeros(3, 4, dtype=torch.bool)], 1)
    narrow, padded = (compute_advantages(one, 0.1, args, lambda x: x) for one in (rollout(), rollout(**wide)))
    for name in ("advantages", "returns"):
        assert_close(getattr(padded, name)[:, :3], getattr(narrow, name), atol=1e-6, rtol=1e-6)
        assert (getattr(padded, name)[:, 3:] == 0).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_observing_in_chunks_gives_the_same_numbers(family):
    policy, other, critic = {
        "gpt2": (tiny.gpt2(0), tiny.gpt2(2), tiny.gpt2_reward(1)),
        "llama": (tiny.llama(0), tiny.llama(2), tiny.llama_reward(1)),
    }[family]
    roles = Roles(ActorCritic(policy, critic, temperature=0.7), FrozenRole(other), None)
    prompts = [list(range(3, 3 + n)) for n in (9, 1, 4, 6, 2)]
    responses = [list(range(50, 50 + n)) for n in (1, 7, 3, 7, 2)]
    found = [
        compute_logprobs_and_values(
            roles,
            prompts,
            responses,
            config(local_rollout_forward_batch_size=size, temperature=0.7),
            torch.device("cpu"),
        )
        for size in (5, 3, 1)
    ]
    for size, (_, passes) in zip((5, 3, 1), found, strict=True):
        assert max(map(len, passes)) <= size
        assert sorted(row for rows in passes for row in rows) == list(range(5))
    seen = [numbers for numbers, _ in found]
    for part in seen[1:]:
        for name, value in part.items():
            assert_close(value, seen[0][name], atol=1e-5, rtol=1e-5)
    # The value after the last token is that of the whole text.
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        text = tensor([prompt + response])
        with torch.no_grad():
            expected = token_values(critic, text, torch.ones_like(text, dtype=torch.bool))[0, -1]
        assert_close(seen[0]["last_value"][i], expected, atol=1e-5, rtol=0)


def test_exact_kl_is_the_sum_over_the_vocabulary():
    one, two = torch.randn(2, 3, 4, 11, generator=torch.Generator().manual_seed(0)).unbind()
    p, q = (torch.distributions.Categorical(logits=x / 0.7) for x in (one, two))
    assert_close(exact_kl(one, two, 0.7), torch.distributions.kl_divergence(p, q))


def test_a_cut_response_is_worth_the_critics_value_at_the_cut():
    off, on = (
        compute_advantages(rollout(), 0.0, config(bootstrap_truncated=b, lam=0.5), lambda x: x) for b in (False, True)
    )
    # The third response is cut after two tokens: delta of the last is score + 0.7 - value there, 0.7 more.
    difference = on.raw_advantages - off.raw_advantages
    assert_close(difference, tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.35, 0.7, 0.0]]))


def test_whitening_of_advantages_can_be_turned_off():
    targets = compute_advantages(rollout(), 0.1, config(whiten_advantages=False), lambda x: x)
    assert torch.equal(targets.advantages, targets.raw_advantages)


def test_an_ended_response_is_worth_nothing_after_its_end():
    """Whatever the critic says there; rows that fill the width and rows that do not."""
    loud = rollout(last_value=tensor([5.0, 6.0, 0.7]))
    quiet, found = (
        compute_advantages(one, 0.0, config(bootstrap_truncated=True), lambda x: x) for one in (rollout(), loud)
    )
    assert_close(found.returns, quiet.returns)
    assert_close(found.returns[1, 0], tensor(-1.0))


def test_each_of_several_eos_ends_a_response():
    ends = RolloutCollector.ended(SimpleNamespace(eos_ids=[2, 7]), [[5, 2], [5, 7], [2, 5], [7], []])
    assert ends == [True, True, False, True, False]


def test_numbers_that_are_not_finite_are_found_wherever_learning_reads_them():
    bad, mask, real = float("nan"), tensor([[True, True, False]] * 2), tensor([True, False])
    fine = {name: torch.zeros(2, 3) for name in ("logp", "ref_logp", "values")} | {"last_value": torch.zeros(2)}
    score = torch.zeros(2)
    assert not any(where.any() for where in find_nonfinite(score, fine, mask, real).values())
    for name, said in (("logp", "log-prob"), ("ref_logp", "reference's log-prob"), ("values", "value")):
        for column, seen in ((1, True), (2, False)):
            x = torch.zeros(2, 3)
            x[0, column] = bad
            found = find_nonfinite(score, fine | {name: x}, mask, real)
            assert {n: where.tolist() for n, where in found.items() if where.any()} == (
                {said: [seen, False]} if seen else {}
            )
    found = find_nonfinite(tensor([bad, bad]), fine | {"last_value": tensor([-math.inf, bad])}, mask, real)
    assert {n: where.tolist() for n, where in found.items() if where.any()} == {
        "score": [True, False],
        "value": [True, False],
    }


def test_rewards_are_whitened_for_learning_and_reported_as_they_are():
    one, options = rollout(raw_score=tensor([20.0, -10.0, 5.0])), {"lam": 1.0, "whiten_advantages": False}
    plain, white = (
        compute_advantages(one, 0.1, config(whiten_rewards=w, **options), lambda x: x) for w in (False, True)
    )
    assert_close(white.rewards, plain.rewards)
    on = plain.rewards[MASK]
    scaled = torch.zeros(3, 3).masked_scatter(MASK, (on - on.mean()) / on.std(correction=0) + on.mean())
    expected = torch.where(MASK, scaled.flip(1).cumsum(1).flip(1), 0)  # what comes from there on
    assert_close(white.returns, expected)
    assert (white.returns - plain.returns).abs().max() > 1


def test_moments_of_large_numbers_are_exact():
    x, mask = tensor([[9999.0, 10001.0, 7.0]]), tensor([[True, True, False]])
    found = global_moments(x, mask, lambda sums: sums)
    assert (found.mean.item(), found.std.item()) == (10000.0, 1.0)


def test_facts_of_a_row_by_hand():
    """Two pads, one of the prompt and one of the response; what lies beside the response is not in a sum."""
    attention = tensor([[False, True, True, True, True, False]])
    fields = {"logp": [-1.0, -2.5, 9.0], "ref_logp": [-1.5, -2.25, 9.0], "values": [0.5, 0.25, 9.0]}
    one = rollout(
        attention=attention,
        mask=tensor([[False] * 3]),  # it is the row's own number that is not finite
        raw_score=tensor([float("-inf")]),
        prompts=[Prompt("a", [5, 6], "x", {}, "a")],
        **{name: tensor([row]) for name, row in fields.items()},
    )
    assert row_facts(one, 0) == {
        "prompt_id": "a",
        "prompt_tokens": 2,
        "response_tokens": 2,
        "score": "-inf",
        "logp": -3.5,
        "ref_logp": -3.75,
        "values": 0.75,
    }


def test_the_base_under_an_adapter_is_cast_before_decoding_and_not_at_each_token(tmp_path, monkeypatch):
    """A GPU's decoder casts nothing itself where the policy has no copy to sample from."""
    seen, decode = [], rollout_module.decode

    def noted(model, *arguments, **options):
        seen.append({p.dtype for name, p in model.named_parameters() if name.endswith("base_layer.weight")})
        return decode(model, *arguments, **options)

    monkeypatch.setattr(rollout_module, "decode", noted)
    tiny_ppo.trainer(tmp_path, lora=True, bf16=True, max_steps=1).train()
    assert seen == [{torch.bfloat16}]


def test_a_row_that_fills_up_a_batch_has_no_tokens_that_count(tmp_path):
    run = tiny_ppo.trainer(tmp_path)
    part, samples = run.prompts[:2], Samples([[5, 6], [7, 8]], [])
    found = run.collector.complete(part, samples, Shard.of_rank(2, run.accelerator), tensor([True, False]))
    assert found.mask.tolist() == [[True, True], [False, False]]
    assert found.attention[:, -2:].all()
    assert found.is_valid.tolist() == [True, False]


def test_functions_are_not_asked_where_no_row_is_real(tmp_path):
    run = tiny_ppo.trainer(tmp_path, reward=lambda completions: 1 / 0)
    found = run.collector.score(run.prompts[:2], [[5], [6]], tensor([False, False]))
    assert found.scores.tolist() == [[0.0], [0.0]]
