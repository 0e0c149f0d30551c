"""Reading a sequence-classification model's scalar head where the mask says."""

from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.functional.masks import last_index, position_ids


def token_values(model: PreTrainedModel | PeftModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The scalar head at every position: ids int [B, L], mask bool [B, L] -> float32 [B, L], reward units."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = inner.base_model(
        input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
    ).last_hidden_state
    return inner.score(hidden).squeeze(-1).float()


def score_tokens(model: PreTrainedModel | PeftModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The head at the last real token of each row: ids int [B, L], mask bool [B, L] -> float32 [B].

    Read by the mask and not by `ids != pad`, so that neither padding nor a pad = EOS token can move it.
    """
    return token_values(model, ids, mask).gather(1, last_index(mask).unsqueeze(1)).squeeze(1)
