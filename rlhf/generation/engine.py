"""Batched decoding with a key-value cache; rows that have ended leave the batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf.functional.masks import position_ids
from rlhf.functional.padding import left_pad
from rlhf.generation.sampling import inverse_cdf

# The batch is cut once this share of its rows is left: cutting copies the cache, so not at every ended row.
_COMPACT_AT = 0.75


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], u: Tensor, eos_ids: Sequence[int], temperature: float
) -> list[list[int]]:
    """Continue each prompt by sampling: B token rows, u float [B, T] -> B responses of at most T tokens.

    A response ends with its first EOS, or is cut after T tokens. Logits processors of the model's own
    generation config play no part: what is sampled from is softmax(logits / temperature).
    """
    device = model.device
    ids, mask = left_pad(prompts, eos_ids[0], device)
    u, stop = u.to(device), torch.tensor(list(eos_ids), device=device)
    batch, length = u.shape
    responses = torch.full((batch, length), eos_ids[0], device=device)
    rows = torch.arange(batch, device=device)  # which response each row of the batch is
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    cache, positions = DynamicCache(), position_ids(mask)
    for t in range(length):
        logits = model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        ids = inverse_cdf(logits, u[rows, t], temperature).unsqueeze(1)
        responses[rows[~ended], t] = ids[~ended, 0]
        ended |= torch.isin(ids[:, 0], stop)
        left = int((~ended).sum())
        if left == 0:
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
        if left <= _COMPACT_AT * len(rows):
            keep = (~ended).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            ids, mask, positions, rows, ended = (
                ids[keep],
                mask[keep],
                positions[keep],
                rows[keep],
                ended[keep],
            )
    return [_until_eos(row, set(eos_ids)) for row in responses.tolist()]


def _until_eos(row: list[int], eos_ids: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(row) if token in eos_ids), len(row) - 1)
    return row[: end + 1]
