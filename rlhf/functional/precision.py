"""Sums in the widest numbers that a device has."""

from functools import cache

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
