"""Scores of finished texts."""

from collections.abc import Sequence
from itertools import chain

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from rlhf.functional.batching import passes_of
from rlhf.functional.padding import right_pad, to_device_together
from rlhf.models.attention import packs
from rlhf.models.heads import score_tokens


def score_passes(model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Row numbers in the passes in which `score_rows` scores them."""
    lengths = list(map(len, rows))
    packed = packs(model, max(lengths, default=0))
    return passes_of(lengths, batch_size, model.device.type, packed=packed)


@torch.no_grad()
def score_rows(
    model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]], batch_size: int, show: str | None = None
) -> Tensor:
    """Scores of N token rows, float32 [N] on the model's device; batched by length so that little padding is computed.

    show: what a progress bar is called; None for no bar.
    """
    groups, device = score_passes(model, rows, batch_size), model.device
    if not groups:
        return torch.empty(0, device=device)
    padded = [right_pad([rows[i] for i in index], model.config.pad_token_id or 0) for index in groups]
    order = torch.tensor([i for index in groups for i in index])
    order, *there = to_device_together([order, *chain.from_iterable(padded)], device)
    passes = list(zip(there[::2], there[1::2], strict=True))
    bar = tqdm(passes, desc=show, unit="batch", disable=show is None or not PartialState().is_main_process)
    # The scores stay on the device until all are there: a look at each pass would make it wait.
    parts = [score_tokens(model, ids, mask) for ids, mask in bar]
    return torch.empty(len(rows), device=device).index_copy_(0, order, torch.cat(parts))
