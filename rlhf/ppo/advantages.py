"""Advantages: from scores and KL to rewards per token, and from those to advantages and returns.

To estimate advantages another way, change `compute_advantages`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.errors import UserError
from rlhf.functional.batching import last_index
from rlhf.functional.gae import Moments, gae, moments, rescale, standardise, wide
from rlhf.functional.losses import kl_penalty
from rlhf.ppo.rollout import Rollout

_NO_SPREAD = 1e-6  # a deviation of this share of the mean is what rounding leaves of equal scores in float32

AllSum = Callable[[Tensor], Tensor]  # float [K] -> [K], summed over ranks


@dataclass(frozen=True)
class Advantages:
    """What learning aims at; float [B, T] each, zero off the response, unless said otherwise."""

    advantages: Tensor  # standardised over all response tokens of the global batch, if whiten_advantages
    returns: Tensor  # reward units
    raw_advantages: Tensor  # reward units
    rewards: Tensor  # per token: the KL penalty, and the score on the last token; reward units, before whitening
    score: Tensor  # float [B]: the response's score, scaled and clipped if asked for, less the EOS penalty


def compute_advantages(
    rollout: Rollout, kl_coef: float, args: PPOConfig, all_sum: AllSum, scaler: "ScoreScaler | None" = None
) -> Advantages:
    """GAE over KL-penalised token rewards. Means and deviations are those of all ranks.

    kl_coef: reward units per nat. scaler: None learns from the scores as they are.
    """
    score = rollout.raw_score if scaler is None else scaler(rollout.raw_score, rollout.is_valid, all_sum)
    if args.missing_eos_penalty is not None:
        score = score - args.missing_eos_penalty * (~rollout.ended).to(score.dtype)
    token_rewards = rewards = compute_token_rewards(rollout, score, kl_coef, args)
    if args.whiten_rewards:
        rewards = rescale(rewards, rollout.mask, global_moments(rewards, rollout.mask, all_sum))
    last = torch.where(rollout.ended, 0, rollout.last_value) if args.bootstrap_truncated else None
    raw, returns = gae(rewards, rollout.values, rollout.mask, args.gamma, args.lam, last)
    advantages = raw
    if args.whiten_advantages:
        advantages = standardise(raw, rollout.mask, global_moments(raw, rollout.mask, all_sum))
    return Advantages(advantages, returns, raw, token_rewards, score)


def compute_token_rewards(rollout: Rollout, score: Tensor, kl_coef: float, args: PPOConfig) -> Tensor:
    """float [B, T]: -kl_coef * KL on every response token, plus the score, float [B], once: on the last token."""
    kl = kl_penalty(rollout.logp, rollout.ref_logp, args.kl_estimator)
    rewards = torch.where(rollout.mask, -kl_coef * kl, 0)
    last = last_index(rollout.mask).unsqueeze(1)
    score = score * rollout.is_valid
    return rewards.scatter_add(1, last, score.unsqueeze(1).to(rewards.dtype))


def global_moments(x: Tensor, mask: Tensor, all_sum: AllSum) -> Moments:
    """Mean and standard deviation of float [B, T] over mask, all ranks: one collective."""
    x = wide(torch.where(mask, x, 0))
    total, squares, count = all_sum(torch.stack([x.sum(), (x**2).sum(), mask.sum().to(x)]))
    m = moments(total, squares, count)
    return Moments(m.mean.float(), m.std.float())


class ScoreScaler:
    """score -> (score - mean) / std of the reference's samples -> running scaling -> clip.

    The first is Ziegler et al. 2019 (arXiv:1909.08593, section 2.1: mean 0 and variance 1 under the reference);
    the second is that of TRL up to 0.11 (Zheng et al. 2023, arXiv:2307.04964).
    """

    def __init__(self, args: PPOConfig) -> None:
        self.args = args
        self.mean, self.std = 0.0, 1.0  # of the reference's samples; plain numbers, which cost no copy to a device
        self.sums = torch.zeros(3, dtype=torch.float64)  # count, sum and sum of squares of all scores so far

    def fit(self, raw: Tensor, is_valid: Tensor, all_sum: AllSum) -> tuple[float, float]:
        """Take mean and standard deviation from scores of the reference's responses, float [B], over all ranks.

        Returns both. A UserError if they are not finite. Scores that are all equal are centred, and not scaled.
        """
        sums = all_sum(_sums(raw, is_valid)).cpu()
        count, total, squares = sums.double()
        m = moments(total, squares, count)
        mean, std = m.mean.item(), m.std.item()
        if not math.isfinite(mean + std):
            raise UserError(f"score_norm_samples: expected finite scores, found mean {mean} and deviation {std}")
        self.mean, self.std = mean, _divisor(m, sums.dtype)
        return mean, std

    def __call__(self, raw: Tensor, is_valid: Tensor, all_sum: AllSum) -> Tensor:
        """float [B], reward units -> float [B], what PPO learns from. is_valid: bool [B], False on padding rows."""
        args = self.args
        score = (raw - self.mean) / self.std
        if args.use_score_scaling:
            sums = all_sum(_sums(score, is_valid)).cpu()
            self.sums = self.sums + sums
            m = moments(self.sums[1], self.sums[2], self.sums[0])
            score = (score - m.mean.item() if args.use_score_norm else score) / _divisor(m, sums.dtype)
        return score if args.score_clip is None else score.clamp(-args.score_clip, args.score_clip)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""
        return {"mean": torch.tensor(self.mean), "std": torch.tensor(self.std), "sums": self.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint."""
        self.mean, self.std, self.sums = state["mean"].item(), state["std"].item(), state["sums"]


def _divisor(m: Moments, summed: torch.dtype) -> float:
    """The deviation; 1 where all scores so far are equal, or there is one: they have no scale yet.

    summed: the type of the sums. In float32 the mean of squares minus the square of the mean is off by more.
    """
    mean, std = m.mean.item(), m.std.item()
    lost = max(_NO_SPREAD, 4 * math.sqrt(torch.finfo(summed).eps))
    return std if std > lost * abs(mean) else 1.0


def _sums(x: Tensor, is_valid: Tensor) -> Tensor:
    x = wide(torch.where(is_valid, x, 0))
    return torch.stack([is_valid.sum().to(x), x.sum(), (x**2).sum()])


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
        # PPOConfig sees to for its batch size, but not for the rows of a user's own loop.
        self.kl_coef *= max(1 + error * n / self.horizon, _SMALLEST)
        return self.kl_coef

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.kl_coef = state["kl_coef"]
