"""Reading a sequence-classification model's score where the mask says."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.functional.padding import left_aligned
from rlhf.models.response import trunk_states


def has_token_head(model: Any) -> bool:
    """Whether the model has a head `score` over a trunk, as transformers' decoders have: one score a position."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return hasattr(inner, "score") and not inner.config.is_encoder_decoder


def column_values(model: PreTrainedModel | PeftModel, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The scalar head at every position: ids int [B, L], right-padded -> float32 [B, L], reward units.

    No mask: real tokens see those before them only. lengths: as in `trunk_states`.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.score(trunk_states(inner, ids, lengths)).squeeze(-1).float()


def score_tokens(model: PreTrainedModel | PeftModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The score of each row: ids int [B, L], mask bool [B, L] -> float32 [B].

    A head `score` is read at the last real token, by the mask and not by `ids != pad`, so that neither padding
    nor a pad = EOS token can move it. Any other model (an encoder, an encoder with a decoder) pools in its own
    forward pass, over rows padded at the right; at the left where its summary is the last position (XLNet).
    """
    if has_token_head(model):
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
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
