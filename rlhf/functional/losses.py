"""Losses, and per-token estimates of KL.

PPO's losses are divided by a token count that the caller passes, so that no split changes them.
"""

import torch
from torch import Tensor


def kl_penalty(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """float [B, T] x2 -> float [B, T], nats, unmasked (J. Schulman, "Approximating KL Divergence", 2020).

    With r = ref/policy on a token that the policy sampled: "k1" is -log r, unbiased, of either sign;
    "k3" is r - 1 - log r, unbiased, never negative, with less variance.
    """
    difference = logp - ref_logp
    if estimator == "k1":
        return difference
    if estimator == "k3":
        return (-difference).exp() - 1 + difference
    raise ValueError(f"kl_estimator: expected 'k1' or 'k3', found {estimator!r}")


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, cliprange: float, n_tokens: int | Tensor
) -> Tensor:
    """Clipped surrogate objective, negated (Schulman et al. 2017, arXiv:1707.06347, eq. 7). Scalar.

    logp, old_logp (nats), advantages: float [B, T]; mask: bool [B, T], True on response tokens;
    n_tokens: response tokens of the whole optimizer step, over all ranks and micro-batches.
    """
    ratio = torch.where(mask, logp - old_logp, 0).exp()
    worst = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))
    return torch.where(mask, worst, 0).sum() / n_tokens


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float,
    n_tokens: int | Tensor,
) -> Tensor:
    """Half the larger of the clipped and unclipped squared errors (as in OpenAI's PPO). Scalar, reward units².

    values, old_values, returns: float [B, T]; mask and n_tokens as in `policy_loss`. Values may move at most
    `cliprange_value` away from the old ones before their gradient stops.
    """
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    worst = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * torch.where(mask, worst, 0).sum() / n_tokens


def pairwise_margin_ranking_loss(chosen: Tensor, rejected: Tensor, margin: float) -> Tensor:
    """Mean of max(0, margin - (chosen - rejected)) (hinge ranking loss; Herbrich et al. 1999).

    chosen, rejected: float [B], reward units -> scalar. Zero once every pair is `margin` apart.
    """
    return torch.nn.functional.margin_ranking_loss(chosen, rejected, torch.ones_like(chosen), margin=margin)
