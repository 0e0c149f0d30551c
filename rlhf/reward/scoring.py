"""Scores of finished texts."""

from collections.abc import Sequence

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from rlhf.functional.batching import passes_of
from rlhf.functional.padding import right_pad
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
    """Scores of N token rows, float32 [N] on the CPU; batched by length so that little padding is computed.

    show: what a progress bar is called; None for no bar.
    """
    scores = torch.empty(len(rows))
    groups = score_passes(model, rows, batch_size)
    for index in tqdm(groups, desc=show, unit="batch", disable=show is None or not PartialState().is_main_process):
        ids, mask = right_pad([rows[i] for i in index], model.config.pad_token_id or 0, model.device)
        scores[index] = score_tokens(model, ids, mask).cpu()
    return scores
