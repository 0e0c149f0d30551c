"""Which positions count."""

from collections.abc import Sequence

import torch
from torch import Tensor


def response_mask(tokens: Tensor, eos_id: int | Sequence[int]) -> Tensor:
    """tokens: int [B, T] -> bool [B, T]; True up to and including the first EOS.

    eos_id may be several ids (chat models often stop at more than one); any of them ends a response.
    """
    ids = torch.as_tensor([eos_id] if isinstance(eos_id, int) else list(eos_id), device=tokens.device)
    is_eos = torch.isin(tokens, ids)
    return (is_eos.cumsum(dim=1) - is_eos.long()) == 0


def position_ids(attention_mask: Tensor) -> Tensor:
    """attention_mask: bool or int [B, L] -> int [B, L]; the first real token of each row is at position 0.

    Models with absolute positions (GPT-2) need it, or left padding shifts what they see. Pads get 0.
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def last_index(mask: Tensor) -> Tensor:
    """mask: bool [B, L] -> int [B]; column of the last True of each row, 0 for a row without one."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (columns * mask).amax(dim=1)
