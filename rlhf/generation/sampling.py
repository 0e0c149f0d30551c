"""Sampling that depends on seed, step and prompt, and on nothing else: not on batch, rank or order."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_WHOLE = 2.0**40


def uniforms(seed: int, step: int, prompt_ids: Sequence[str], length: int) -> Tensor:
    """One number in [0, 1) for each token of each prompt: float32 [B, length], on the CPU.

    Every prompt has its own stream, seeded by (seed, step, its id).
    """
    rows = [
        np.random.default_rng((seed, step, int.from_bytes(hashlib.sha256(p.encode()).digest()[:8]))).random(
            length, dtype=np.float32
        )
        for p in prompt_ids
    ]
    return torch.from_numpy(np.stack(rows))


def inverse_cdf(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """The token at quantile u of softmax(logits / temperature): float [B, V], float [B] -> int [B]."""
    scaled = logits.float()
    scaled = scaled / temperature if temperature != 1 else scaled
    probabilities = scaled.softmax(-1)
    if logits.device.type == "cpu":
        cumulative = probabilities.cumsum(-1)
        # Scaled by the last entry, since a float32 sum over a vocabulary misses 1 by more than u's resolution.
        target = (u * cumulative[:, -1]).unsqueeze(1)
    else:
        cumulative, target = in_whole_numbers(probabilities, u)
    # right=True: the first token whose cumulative probability exceeds u, so one of probability 0 never comes.
    token = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return token.clamp(max=logits.shape[1] - 1)


def in_whole_numbers(probabilities: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative probabilities int [B, V] and quantiles int [B, 1], in units of 2^-40.

    Such a sum is exact in any order: CUDA has a deterministic one, which it has not of floats. On a CPU it takes twice
    the time of a sum of floats.
    """
    cumulative = (probabilities * _WHOLE).long().cumsum(-1)
    return cumulative, (u.double() * cumulative[:, -1]).long().unsqueeze(1)
