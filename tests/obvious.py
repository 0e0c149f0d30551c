"""The slow, obvious way: whole logits, masks and positions as transformers takes them, nothing left out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.functional.batching import position_ids


def response_logits(policy, ids, mask, n_response):
    """Logits at the T positions that predict a response token and at the last one: [B, T+1, V]. Left-padded rows."""
    return policy(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        use_cache=False,
        logits_to_keep=n_response + 1,
    ).logits


def token_values(model, ids, mask):
    """The scalar head at every position: ids int [B, L], mask bool [B, L], padded at either side -> [B, L]."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.base_model(
        input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
    ).last_hidden_state
    return inner.score(hidden).squeeze(-1).float()


def logp(logits, tokens, temperature):
    """Log-prob of the tokens and entropy, by log_softmax over the whole vocabulary."""
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def response_mask(tokens: Tensor, eos_id: int | Sequence[int]) -> Tensor:
    """tokens: int [B, T] -> bool [B, T]; True up to and including the first EOS.

    eos_id may be several ids (chat models often stop at more than one); any of them ends a response.
    """
    ids = torch.as_tensor([eos_id] if isinstance(eos_id, int) else list(eos_id), device=tokens.device)
    is_eos = torch.isin(tokens, ids)
    return (is_eos.cumsum(dim=1) - is_eos.long()) == 0


def distinct(ids, lengths):
    """How many beginnings of texts there are: a token is computed once for each."""
    rows = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    return len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})


def widths(model):
    """Rows and columns of each call of a trunk from now on."""
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, given: seen.append(tuple((*args, given.get("input_ids"))[0].shape)), with_kwargs=True
    )
    return seen
