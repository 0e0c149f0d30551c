"""Ids that stand for no token: rows of an embedding beyond the tokenizer. They have probability 0."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.models.unwrap import Model, unwrap_peft

_NEVER = -1e4  # a logit of probability 0, in every precision


def ids_without_token(
    model: Model, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], device: torch.device
) -> Tensor | None:
    """The ids of the model that the tokenizer has no token for, int [K]; None if there are none.

    Qwen2.5 has 151,936 rows for 151,665 tokens. Where a response may end is never among them.
    """
    known = {*tokenizer.get_vocab().values(), *eos_ids}
    missing = sorted(set(range(unwrap_peft(model).config.get_text_config(decoder=True).vocab_size)) - known)
    return torch.tensor(missing, device=device) if missing else None


def suppress(logits: Tensor, ids: Tensor | None) -> Tensor:
    """Logits float [..., V] with probability 0 at `ids`, int [K] or None, in place.

    Past autograd: where the probability is 0, so is the gradient.
    """
    if ids is not None:
        logits.detach().index_fill_(-1, ids, _NEVER)
    return logits
