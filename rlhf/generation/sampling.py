"""Sampling that depends on seed, step and prompt, and on nothing else: not on batch, rank or order."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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
    cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    # Scaled by the last entry, since a float32 sum over a vocabulary misses 1 by more than u's resolution.
    # right=True: the first token whose cumulative probability exceeds u, so one of probability 0 never comes.
    target = (u * cumulative[:, -1]).unsqueeze(1)
    token = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return token.clamp(max=logits.shape[1] - 1)
