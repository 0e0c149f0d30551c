"""Scores of token rows by a reward model."""

from collections.abc import Sequence
from itertools import chain

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from rlhf.functional.batching import left_aligned, passes_of, right_pad, to_device_together
from rlhf.models.kernels.attention import packs
from rlhf.models.token_logprobs import trunk_states
from rlhf.models.unwrap import has_token_head, unwrap_peft


def score_tokens(model: PreTrainedModel | PeftModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The score of each row: ids int [B, L], mask bool [B, L] -> float32 [B].

    A head `score` is read at the last token in the mask, not by `ids != pad`, so that padding and a pad token equal
    to EOS do not matter. Any other model (an encoder, an encoder-decoder) pools in its own forward pass, over rows
    padded on the right, or on the left if its summary is the last position (XLNet).
    """
    if has_token_head(model):
        inner = unwrap_peft(model)
        lengths = mask.sum(1).clamp(min=1)
        states = trunk_states(inner, left_aligned(ids, mask)[0], lengths)
        start = torch.arange(len(ids), device=ids.device) * states.shape[1]
        last = states.flatten(0, 1).index_select(0, start + lengths - 1)
        return inner.score(last).squeeze(-1).float()
    if getattr(model.config, "summary_type", None) == "last":
        ids, mask = (x.flip(1) for x in left_aligned(ids.flip(1), mask.flip(1)))
    else:
        ids, mask = left_aligned(ids, mask)
    return model(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1).float()


def score_passes(model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """The row numbers of each forward pass of `score_rows`."""
    lengths = list(map(len, rows))
    packed = packs(model, max(lengths, default=0))
    return passes_of(lengths, batch_size, model.device.type, packed=packed)


@torch.no_grad()
def score_rows(
    model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]], batch_size: int, show: str | None = None
) -> Tensor:
    """Scores of N token rows, float32 [N] on the model's device; batched by length to save padding.

    show: label of the progress bar; None for no bar.
    """
    groups, device = score_passes(model, rows, batch_size), model.device
    if not groups:
        return torch.empty(0, device=device)
    padded = [right_pad([rows[i] for i in index], model.config.pad_token_id or 0) for index in groups]
    order = torch.tensor([i for index in groups for i in index])
    order, *there = to_device_together([order, *chain.from_iterable(padded)], device)
    passes = list(zip(there[::2], there[1::2], strict=True))
    bar = tqdm(passes, desc=show, unit="batch", disable=show is None or not PartialState().is_main_process)
    # Keep the scores on the device until the end: reading each pass would make the host wait.
    parts = [score_tokens(model, ids, mask) for ids, mask in bar]
    return torch.empty(len(rows), device=device).index_copy_(0, order, torch.cat(parts))
