"""The EOS that ends a response counts, also where the pad token is the EOS; what is behind it does not."""

import math

import pytest
import tiny
import torch
from obvious import response_mask
from test_learner import Rank
from test_rollout import config
from tiny_ppo import trainer
from torch.testing import assert_close

from rlhf.distributed.collectives import Shard
from rlhf.models import actor_critic
from rlhf.models.actor_critic import ActorCritic, FrozenRole
from rlhf.ppo.advantages import Advantages
from rlhf.ppo.learner import Learner
from rlhf.ppo.prompts import Prompt
from rlhf.ppo.roles import Roles
from rlhf.ppo.rollout import Rollout, compute_logprobs_and_values, pad_batch
from rlhf.reward.scoring import score_tokens

EOS = 2
PROMPTS = [[5, EOS, 6], [7], [8, 9]]  # a chat's turns end with the EOS, too
RESPONSES = [[40, 41, EOS], [EOS], [50, 51, 52, 53, 54]]  # ended, empty but for its end, cut


def rollout(roles, args):
    ids, attention, mask = pad_batch(PROMPTS, RESPONSES, EOS)
    score, real = torch.tensor([1.0, -1.0, 0.5]), torch.ones(3, dtype=torch.bool)
    ended = torch.tensor([True, True, False])
    seen, _ = compute_logprobs_and_values(roles, PROMPTS, RESPONSES, args, torch.device("cpu"))
    said = {"scores": score.unsqueeze(1), "raw_score": score, "reward_names": ["judge"]}
    prompts = [Prompt(str(i), row, "", {}, str(i)) for i, row in enumerate(PROMPTS)]
    host = {"prompts": prompts, "responses": RESPONSES, "shard": Shard(3, 0, 1)}
    return Rollout(ids, attention, mask, ended, real, **said, **seen, **host)


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_the_policy_learns_to_end_and_nothing_behind_the_end(monkeypatch, make):
    args = config(num_ppo_epochs=1, per_device_train_batch_size=3, gradient_accumulation_steps=1, vf_coef=0.0)
    trained = ActorCritic(make(), tiny.llama_reward(), args.temperature)
    one = rollout(Roles(trained, FrozenRole(make()), None), args)
    assert one.mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert (one.ids[:, 3:][~one.mask] == EOS).all()  # the pads look the same
    kept = []
    logp_of = actor_critic.logp_of

    def keep(logits, tokens, temperature):
        logits.retain_grad()
        kept.append((tokens, logits))
        return logp_of(logits, tokens, temperature)

    monkeypatch.setattr(actor_critic, "logp_of", keep)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)
    targets = Advantages(*(one.mask.float() * 0.7 for _ in range(4)), one.raw_score)
    done = Learner(trained, optimizer, Rank(), args).learn(one, targets, 1)
    assert all(math.isfinite(x) for x in [*done.statistics, *done.norms, done.ratio_max])
    assert done.tokens == 9
    ((tokens, logits),) = kept
    # Only the nine tokens up to each EOS get logits at all; what is behind is not looked at.
    assert sorted(tokens.tolist()) == sorted(one.ids[:, 3:][response_mask(one.ids[:, 3:], EOS)].tolist())
    assert len(tokens) == 9
    at = logits.grad.gather(1, tokens.unsqueeze(1))
    assert (at < 0).all()  # a positive advantage: descent makes the token likelier, the EOS included
    assert (tokens == EOS).sum() == 2


def test_the_policys_own_end_is_scored_and_learned_from(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(32)]
    options = {"per_device_train_batch_size": 16, "response_length": 20, "temperature": 3.0, "max_steps": 1}
    run = trainer(tmp_path, rows=rows, learning_rate=0.0, **options)
    eos = run.processing_class.eos_token_id
    assert run.processing_class.pad_token_id == eos
    one = run.collect(1, run.prompts)
    prompt_width = one.ids.shape[1] - one.mask.shape[1]
    assert 0 < one.ended.sum() < 32
    assert torch.equal(one.mask, response_mask(one.ids[:, prompt_width:], eos) & one.attention[:, prompt_width:])
    for i, (prompt, response) in enumerate(zip(one.prompts, one.responses, strict=True)):
        assert eos in prompt.input_ids
        assert one.attention[i, :prompt_width].sum() == len(prompt.input_ids)  # the prompt's own EOS is read
        assert one.mask[i].sum() == len(response)
        assert (response[-1] == eos) == bool(one.ended[i])
        row = torch.tensor([prompt.input_ids + response])
        with torch.no_grad():
            score = score_tokens(run.roles.reward.base, row, torch.ones_like(row, dtype=torch.bool))[0]
        assert_close(one.raw_score[i], score, atol=1e-5, rtol=0)
