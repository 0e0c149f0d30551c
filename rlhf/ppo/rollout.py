"""Act and judge: what the policy said, and whether that was better than expected."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.functional.advantages import Moments, gae, moments, rescale, standardise
from rlhf.functional.kl import kl_penalty
from rlhf.functional.masks import last_index
from rlhf.functional.padding import left_pad, right_pad
from rlhf.models.actor_critic import ActorCritic, FrozenRoles


@dataclass(frozen=True)
class Rollout:
    """What the policy did, once; nothing downstream changes it. B samples, P prompt, T response tokens."""

    ids: Tensor  # int   [B, P+T] left-padded prompt, then right-padded response
    attention: Tensor  # bool  [B, P+T] True on real tokens
    mask: Tensor  # bool  [B, T]   True on response tokens, first EOS included
    ended: Tensor  # bool  [B]      False when cut at response_length
    real: Tensor  # bool  [B]      False on filler rows that only keep the ranks in step
    logp: Tensor  # float [B, T]   log pi_old(token), nats
    ref_logp: Tensor  # float [B, T]   log pi_ref(token), nats
    entropy: Tensor  # float [B, T]   of the policy's distribution, nats
    values: Tensor  # float [B, T]   critic, reward units
    score: Tensor  # float [B]      reward model on the finished text


@dataclass(frozen=True)
class Targets:
    """What learning aims at; float [B, T] each, zero off-mask."""

    advantages: Tensor  # standardised over all response tokens of the global batch
    returns: Tensor  # reward units


def pack(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Token rows -> (ids int [B, P+T], attention bool [B, P+T], mask bool [B, T])."""
    prompt_ids, prompt_mask = left_pad(prompts, pad_id, device)
    response_ids, mask = right_pad(responses, pad_id, device)
    return torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, mask], 1), mask


def trim(attention: Tensor, mask: Tensor, index: Tensor) -> tuple[slice, int]:
    """For some rows, the columns of [B, P+T] that any of them uses, and how many of those are response."""
    prompt_width = attention.shape[1] - mask.shape[1]
    longest_prompt = int(attention[index, :prompt_width].sum(1).max())
    longest_response = max(1, int(mask[index].sum(1).max()))
    return slice(prompt_width - longest_prompt, prompt_width + longest_response), longest_response


def by_length(attention: Tensor, size: int) -> Iterator[Tensor]:
    """Row indices in groups of `size` of about the same length: little padding is computed."""
    yield from attention.sum(1).argsort().split(size)


@torch.no_grad()
def observe(
    model: ActorCritic,
    frozen: FrozenRoles,
    packed: tuple[Tensor, Tensor, Tensor],
    ended: Tensor,
    real: Tensor,
    args: PPOConfig,
) -> Rollout:
    """One pass of each role over the finished sequences, in chunks of local_rollout_forward_batch_size."""
    ids, attention, mask = packed
    per_token = [torch.zeros(mask.shape, device=ids.device) for _ in range(4)]
    score = torch.zeros(len(ids), device=ids.device)
    for index in by_length(attention, args.local_rollout_forward_batch_size):
        columns, width = trim(attention, mask, index)
        part_ids, part_attention = ids[index, columns], attention[index, columns]
        logp, entropy, values = model(part_ids, part_attention, width)
        ref_logp = frozen.reference_logp(part_ids, part_attention, width, args.temperature)
        for whole, part in zip(per_token, (logp, ref_logp, entropy, values), strict=True):
            whole[index, :width] = torch.where(mask[index, :width], part, 0)
        score[index] = frozen.score(part_ids, part_attention)
    # Filler rows count for nothing from here on.
    mask = mask & real.unsqueeze(1)
    logp, ref_logp, entropy, values = per_token
    return Rollout(ids, attention, mask, ended, real, logp, ref_logp, entropy, values, score)


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
    advantages, returns = gae(rewards, rollout.values, rollout.mask, args.gamma, args.lam)
    scale = global_moments(advantages, rollout.mask, all_sum)
    return Targets(standardise(advantages, rollout.mask, scale), returns)


def global_moments(x: Tensor, mask: Tensor, all_sum: Callable[[Tensor], Tensor]) -> Moments:
    """Mean and standard deviation of float [B, T] over mask, all ranks: one collective."""
    x = torch.where(mask, x, 0).double()
    total, squares, count = all_sum(torch.stack([x.sum(), (x**2).sum(), mask.sum().double()]))
    m = moments(total, squares, count)
    return Moments(m.mean.float(), m.std.float())


def select(record: Rollout | Targets, index: Tensor) -> dict[str, Tensor]:
    """Some rows of a record, by field name."""
    return {f.name: getattr(record, f.name)[index] for f in fields(record)}
