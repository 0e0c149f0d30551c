"""Scores and values from a sequence-classification model, read where the mask says."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.functional.masks import last_index, position_ids
from rlhf.functional.padding import right_pad


def token_values(model: PreTrainedModel | PeftModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The scalar head at every position: ids int [B, L], mask bool [B, L] -> float32 [B, L], reward units."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = inner.base_model(
        input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
    ).last_hidden_state
    return inner.score(hidden).squeeze(-1).float()


def score_tokens(model: PreTrainedModel | PeftModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The head at the last real token of each row: ids int [B, L], mask bool [B, L] -> float32 [B]."""
    return token_values(model, ids, mask).gather(1, last_index(mask).unsqueeze(1)).squeeze(1)


@torch.no_grad()
def score_rows(model: PreTrainedModel, rows: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """Scores of N token rows, float32 [N] on the CPU; batched by length so that little padding is computed."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = torch.empty(len(rows))
    for start in range(0, len(rows), batch_size):
        index = order[start : start + batch_size]
        ids, mask = right_pad([rows[i] for i in index], model.config.pad_token_id or 0, model.device)
        scores[index] = score_tokens(model, ids, mask).cpu()
    return scores
