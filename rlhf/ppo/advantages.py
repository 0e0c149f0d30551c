"""Act and judge: what the policy said, and whether that was better than expected."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.functional.batching import last_index
from rlhf.functional.gae import Moments, gae, moments, rescale, standardise, wide
from rlhf.functional.losses import kl_penalty
from rlhf.ppo.rollout import Rollout

CLIP = 0.2  # of the relative error

_SMALLEST = 0.1  # factor of one update


class AdaptiveKLController:
    """Proportional controller of the KL coefficient (Ziegler et al. 2019, arXiv:1909.08593, eq. 4).

    kl_coef: starting coefficient, reward units per nat; target: wanted KL per token, nats;
    horizon: samples over which a constant full-size error multiplies the coefficient by about e^0.2.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        self.kl_coef = kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> float:
        """Measured KL per token and samples seen since the last update -> the new coefficient."""
        error = min(max(kl / self.target - 1, -CLIP), CLIP)
        # A coefficient of 0 would stay there, and one below would reward KL: n is to be under horizon / CLIP, which
        # PPOConfig sees to for its batch size, but not for rows that a loop of one's own brings.
        self.kl_coef *= max(1 + error * n / self.horizon, _SMALLEST)
        return self.kl_coef

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.kl_coef = state["kl_coef"]


@dataclass(frozen=True)
class Targets:
    """What learning aims at; float [B, T] each, zero off-mask."""

    advantages: Tensor  # standardised over all response tokens of the global batch
    returns: Tensor  # reward units
    raw_advantages: Tensor  # reward units


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
