"""Scores of finished texts by a reward model: which go through it together, and the score of each."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from rlhf.functional.batching import left_aligned, passes_of, right_pad, to_device_together
from rlhf.models.actor_critic import trunk_states
from rlhf.models.kernels.attention import packs
from rlhf.models.unwrap import unwrap_peft


def has_token_head(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the model has a head `score` over a trunk, as transformers' decoders have: one score a position."""
    return hasattr(model, "score") and not model.config.is_encoder_decoder


def score_tokens(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The score of each row: ids int [B, L], mask bool [B, L] -> float32 [B]. model: without a PEFT one around it.

    A head `score` is read at the last real token, by the mask and not by `ids != pad`, so that neither padding
    nor a pad = EOS token can move it. Any other model (an encoder, an encoder with a decoder) pools in its own
    forward pass, over rows padded at the right; at the left where its summary is the last position (XLNet).
    """
    if has_token_head(model):
        lengths = mask.sum(1).clamp(min=1)
        states = trunk_states(model, left_aligned(ids, mask)[0], lengths)
        start = torch.arange(len(ids), device=ids.device) * states.shape[1]
        last = states.flatten(0, 1).index_select(0, start + lengths - 1)
        return model.score(last).squeeze(-1).float()
    if getattr(model.config, "summary_type", None) == "last":
        ids, mask = (x.flip(1) for x in left_aligned(ids.flip(1), mask.flip(1)))
    else:
        ids, mask = left_aligned(ids, mask)
    return model(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1).float()


def score_passes(model: PreTrainedModel, rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Row numbers in the passes in which `score_rows` scores them. model: without a PEFT one around it."""
    lengths = list(map(len, rows))
    packed = packs(model, max(lengths, default=0))
    return passes_of(lengths, batch_size, model.device.type, packed=packed)


def score_rows(
    model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]], batch_size: int, show: str | None = None
) -> Tensor:
    """Scores of N token rows, float32 [N] on the model's device; batched by length so that little padding is computed.

    show: title of a progress bar; None for no bar.
    """
    base = unwrap_peft(model)
    return run_passes(base, rows, score_passes(base, rows, batch_size), show)


def score_pairs(
    model: PreTrainedModel | PeftModel,
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    batch_size: int,
    show: str | None = None,
) -> Tensor:
    """Scores of N pairs of token rows, float32 [2, N] on the model's device; at most batch_size pairs at a time.

    Where texts go through the model unpadded, a pair's are in one pass, which computes their prompt once.
    """
    base, rows, n = unwrap_peft(model), [*chosen, *rejected], len(chosen)
    longest = [max(map(len, pair)) for pair in zip(chosen, rejected, strict=True)]
    if packs(base, max(longest, default=0)):
        pairs = passes_of(longest, batch_size, base.device.type, packed=True)
        passes = [[*index, *(n + i for i in index)] for index in pairs]
    else:
        passes = score_passes(base, rows, batch_size)
    return run_passes(base, rows, passes, show).view(2, n)


@torch.no_grad()
def run_passes(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    passes: Sequence[Sequence[int]],
    show: str | None = None,
) -> Tensor:
    """As `score_rows`, in the passes that `score_passes` planned. model: without a PEFT one around it."""
    device = model.device
    if not passes:
        return torch.empty(0, device=device)
    padded = [right_pad([rows[i] for i in index], model.config.pad_token_id or 0) for index in passes]
    order = torch.tensor([i for index in passes for i in index])
    order, *there = to_device_together([order, *chain.from_iterable(padded)], device)
    batches = list(zip(there[::2], there[1::2], strict=True))
    bar = tqdm(batches, desc=show, unit="batch", disable=show is None or not PartialState().is_main_process)
    # The scores stay on the device until all are there: reading each pass's would make it wait.
    parts = [score_tokens(model, ids, mask) for ids, mask in bar]
    return torch.empty(len(rows), device=device).index_copy_(0, order, torch.cat(parts))
