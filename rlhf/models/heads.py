"""Reading a sequence-classification model's score where the mask says."""

from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.functional.masks import last_index, position_ids
from rlhf.functional.padding import left_aligned


def has_token_head(model: Any) -> bool:
    """Whether the model has a head `score` over a trunk, as transformers' decoders have: one score a position."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return hasattr(inner, "score") and not inner.config.is_encoder_decoder


def token_values(model: PreTrainedModel | PeftModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The scalar head at every position: ids int [B, L], mask bool [B, L] -> float32 [B, L], reward units."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = inner.base_model(
        input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
    ).last_hidden_state
    return inner.score(hidden).squeeze(-1).float()


def score_tokens(model: PreTrainedModel | PeftModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The score of each row: ids int [B, L], mask bool [B, L] -> float32 [B].

    A head `score` is read at the last real token, by the mask and not by `ids != pad`, so that neither padding
    nor a pad = EOS token can move it. Any other model (an encoder, an encoder with a decoder) pools in its own
    forward pass, over rows padded at the right; at the left where its summary is the last position (XLNet).
    """
    if has_token_head(model):
        return token_values(model, ids, mask).gather(1, last_index(mask).unsqueeze(1)).squeeze(1)
    if getattr(model.config, "summary_type", None) == "last":
        ids, mask = (x.flip(1) for x in left_aligned(ids.flip(1), mask.flip(1)))
    else:
        ids, mask = left_aligned(ids, mask)
    return model(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1).float()
