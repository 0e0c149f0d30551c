"""Act and judge: what the policy said, and whether that was better than expected."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.functional.advantages import Moments, gae, moments, rescale, standardise
from rlhf.functional.batching import passes_of
from rlhf.functional.kl import kl_penalty
from rlhf.functional.masks import last_index
from rlhf.functional.padding import left_pad, right_pad
from rlhf.functional.precision import wide
from rlhf.models.actor_critic import base_of
from rlhf.models.attention import packs
from rlhf.models.response import exact_kl, head_logits, in_chunks, logp_of, texts_of, token_rows, trunk_states
from rlhf.ppo.roles import Roles


@dataclass(frozen=True)
class Rollout:
    """What the policy did, once; nothing downstream changes it. B samples, P prompt, T response tokens."""

    ids: Tensor  # int   [B, P+T] left-padded prompt, then right-padded response
    attention: Tensor  # bool  [B, P+T] True on real tokens
    mask: Tensor  # bool  [B, T]   True on response tokens, first EOS included
    ended: Tensor  # bool  [B]      False when cut
    real: Tensor  # bool  [B]      False on filler rows that only keep the ranks in step
    logp: Tensor  # float [B, T]   log pi_old(token), nats
    ref_logp: Tensor  # float [B, T]   log pi_ref(token), nats
    entropy: Tensor  # float [B, T]   of the policy's distribution, nats
    exact_kl: Tensor  # float [B, T]   KL(pi_old || pi_ref) over the whole vocabulary, nats
    values: Tensor  # float [B, T]   critic, reward units
    last_value: Tensor  # float [B]      critic after the last token, reward units
    scores: Tensor  # float [B, K]   one column a reward source, as it came; NaN is no opinion
    raw_score: Tensor  # float [B]      their weighted sum
    score: Tensor  # float [B]      what PPO learns from: raw_score scaled and clipped where asked for


@dataclass(frozen=True)
class Targets:
    """What learning aims at; float [B, T] each, zero off-mask."""

    advantages: Tensor  # standardised over all response tokens of the global batch
    returns: Tensor  # reward units
    raw_advantages: Tensor  # reward units


def pack(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Token rows -> (ids int [B, P+T], attention bool [B, P+T], mask bool [B, T])."""
    prompt_ids, prompt_mask = left_pad(prompts, pad_id, device)
    response_ids, mask = right_pad(responses, pad_id, device)
    return torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, mask], 1), mask


@torch.no_grad()
def observe(
    roles: Roles,
    packed: tuple[Tensor, Tensor, Tensor],
    args: PPOConfig,
    note: Callable[[list[int]], None] = lambda rows: None,
    tokens: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]] | None = None,
) -> dict[str, Tensor]:
    """One pass of policy, critic and reference over finished texts, local_rollout_forward_batch_size at a time.

    packed: as `pack` makes them; tokens: the prompts and responses that it was given, read from the first two where
    they are not given here, for which a GPU has to wait. note: told the rows of each pass.
    Returns the fields of a Rollout that come from them, float32, zero off-mask.
    """
    ids, attention, mask = packed
    (count, width), device = mask.shape, ids.device
    prompts, responses = tokens or token_rows(ids, attention, width)
    names = ("logp", "ref_logp", "entropy", "exact_kl", "values")
    seen = torch.zeros(len(names), count * width, device=device)
    last_value = torch.zeros(count, device=device)
    policy = base_of(roles.trained.policy)

    def per_token(states: Tensor, ref_states: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        logits = head_logits(policy, states)
        with roles.reference.active() as model:
            ref_logits = head_logits(base_of(model), ref_states)
        logp, entropy = logp_of(logits, tokens, args.temperature)
        ref_logp, _ = logp_of(ref_logits, tokens, args.temperature)
        return logp, ref_logp, entropy, exact_kl(logits, ref_logits, args.temperature)

    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    longest = max(lengths)
    without_padding = roles.trained.packs(longest) and packs(roles.reference.model, longest)
    kind, budget = device.type, args.micro_batch_tokens
    groups = passes_of(lengths, args.local_rollout_forward_batch_size, kind, budget, without_padding)
    for group, texts in zip(groups, texts_of(prompts, responses, groups, width, device), strict=True):
        note(group)
        states, values = roles.trained.states_and_values(texts)
        with roles.reference.active() as model:
            ref_states = trunk_states(base_of(model), texts.ids, texts.lengths)
        inputs = texts.at_tokens(states), texts.at_tokens(ref_states), texts.tokens
        flat = in_chunks(per_token, policy.config.vocab_size, *inputs)
        seen.index_copy_(1, texts.places, torch.stack([*flat, texts.at_tokens(values)]))
        last_value.index_copy_(0, texts.rows, values.flatten().index_select(0, texts.last))
    return dict(zip(names, seen.view(len(names), count, width), strict=True)) | {"last_value": last_value}


def penalised_score(rollout: Rollout, missing_eos_penalty: float | None) -> Tensor:
    """The score less the penalty where the response was cut, float [B]."""
    if missing_eos_penalty is None:
        return rollout.score
    return rollout.score - missing_eos_penalty * (~rollout.ended).to(rollout.score.dtype)


def token_rewards(rollout: Rollout, kl_coef: float, args: PPOConfig) -> Tensor:
    """float [B, T]: -kl_coef * KL on every response token, plus the score once, on the last one."""
    kl = kl_penalty(rollout.logp, rollout.ref_logp, args.kl_estimator)
    rewards = torch.where(rollout.mask, -kl_coef * kl, 0)
    last = last_index(rollout.mask).unsqueeze(1)
    score = penalised_score(rollout, args.missing_eos_penalty) * rollout.real
    return rewards.scatter_add(1, last, score.unsqueeze(1).to(rewards.dtype))


def judge(rollout: Rollout, kl_coef: float, args: PPOConfig, all_sum: Callable[[Tensor], Tensor]) -> Targets:
    """Advantages and returns. all_sum: float [K] -> [K], summed over ranks: moments are those of all ranks."""
    rewards = token_rewards(rollout, kl_coef, args)
    if args.whiten_rewards:
        rewards = rescale(rewards, rollout.mask, global_moments(rewards, rollout.mask, all_sum))
    last = torch.where(rollout.ended, 0, rollout.last_value) if args.bootstrap_truncated else None
    raw, returns = gae(rewards, rollout.values, rollout.mask, args.gamma, args.lam, last)
    if not args.whiten_advantages:
        return Targets(raw, returns, raw)
    scale = global_moments(raw, rollout.mask, all_sum)
    return Targets(standardise(raw, rollout.mask, scale), returns, raw)


def global_moments(x: Tensor, mask: Tensor, all_sum: Callable[[Tensor], Tensor]) -> Moments:
    """Mean and standard deviation of float [B, T] over mask, all ranks: one collective."""
    x = wide(torch.where(mask, x, 0))
    total, squares, count = all_sum(torch.stack([x.sum(), (x**2).sum(), mask.sum().to(x)]))
    m = moments(total, squares, count)
    return Moments(m.mean.float(), m.std.float())


def select(record: Rollout | Targets, index: Tensor) -> dict[str, Tensor]:
    """Some rows of a record, by field name."""
    return {f.name: getattr(record, f.name)[index] for f in fields(record)}
