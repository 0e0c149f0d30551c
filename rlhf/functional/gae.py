"""Advantages, and the moments that scale them: sums in the widest numbers that a device has."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


@cache
def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without it (Apple's GPUs, some of Intel's): asked once a process."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def wide(x: Tensor) -> Tensor:
    """The same numbers in the widest type that their device has."""
    return x.to(widest(x.device))


class Moments(NamedTuple):
    """Mean and (biased) standard deviation of masked values; the caller decides over which ranks."""

    mean: Tensor  # float []
    std: Tensor  # float []


def moments(total: Tensor, total_of_squares: Tensor, count: Tensor) -> Moments:
    """Sums over any number of shards (each float []) -> Moments. An empty set has mean 0 and std 0."""
    count = count.clamp(min=1)
    mean = total / count
    return Moments(mean, (total_of_squares / count - mean**2).clamp(min=0).sqrt())


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, last_values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16).

    rewards, values: float [B, T]; mask: bool [B, T], True on response tokens, contiguous from column 0.
    last_values: float [B], the value of the state after the last token; 0, that of a finished response, if not
    given. Returns (advantages, returns), float [B, T], zero off-mask.
    """
    weight = mask.to(values.dtype)
    # torch.where and not a product: an off-mask value may be anything, NaN included.
    values = torch.where(mask, values, 0)
    rewards = torch.where(mask, rewards, 0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    if last_values is not None:
        last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
        next_values = torch.where(last, last_values.unsqueeze(1), next_values)
    delta = rewards + gamma * next_values - values
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = delta[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages * weight, (advantages + values) * weight


def standardise(x: Tensor, mask: Tensor, m: Moments) -> Tensor:
    """float [B, T] -> mean 0, std 1 under the moments passed in, zero off-mask. For advantages."""
    return torch.where(mask, (x - m.mean) / (m.std + 1e-8), 0)


def rescale(x: Tensor, mask: Tensor, m: Moments) -> Tensor:
    """float [B, T] -> std 1, mean kept, zero off-mask. For rewards."""
    return torch.where(mask, (x - m.mean) / (m.std + 1e-8) + m.mean, 0)
