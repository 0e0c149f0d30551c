"""Causal attention by matrix products, for bf16 on a CPU: PyTorch's own kernel is slow there.

With its gradient 2 to 4 times as fast on 2 cores (60 to 500 tokens); in float32 it is not. It keeps the
probabilities for the backward pass, so that memory grows by the square of the length: not for long texts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

_NAME = "causal_products"  # a name of this package's in transformers' table of attention functions
# Kinds of model that go by transformers' table; others also look at the name "sdpa" (Falcon, DeepSeek-V3.2).
_KINDS = {"gpt2", "gpt_neox", "llama", "mistral", "olmo", "phi3", "qwen2", "qwen3"}
_LONGEST = 512
_NO_MATTER = {"position_ids", "use_cache", "sliding_window"}  # of a window that cuts anything off, the mask tells
_SDPA = AttentionInterface()["sdpa"]


def use_causal_products(model: PreTrainedModel) -> None:
    """Let a model that runs PyTorch's attention run this one where it applies: on a CPU, in bf16, without a mask.

    A model of a kind that this was not tried with stays as it is.
    """
    if model.config.model_type in _KINDS and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_NAME)


def causal_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * query key', causal) value: [B, H, L, d], [B, K, L, d] twice -> [B, H, L, d]; K divides H.

    The H / K query heads of a key head are rows of one product, so that keys and values are not repeated.
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    ahead = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)
    rows = query.reshape(-1, groups * length, width)
    key, value = (x.reshape(-1, length, width) for x in (key, value))
    scores = torch.baddbmm(ahead.repeat(groups, 1), rows, key.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), value).view(batch, heads, length, width)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`, which does what is not for products."""
    length, causal = query.shape[2], getattr(module, "is_causal", True) if is_causal is None else is_causal
    on_cpu = query.device.type == "cpu"
    dtype = torch.get_autocast_dtype("cpu") if on_cpu and torch.is_autocast_enabled("cpu") else query.dtype
    square = causal and attention_mask is None and 1 < length == key.shape[2] <= _LONGEST
    # An option of a kind of model not thought of here may change the values: a cap on scores, a sink.
    plain = not dropout and all(x is None for name, x in options.items() if name not in _NO_MATTER)
    if not (square and plain and on_cpu and dtype == torch.bfloat16 and query.shape[-1] == value.shape[-1]):
        more: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **options}
        return _SDPA(module, query, key, value, attention_mask, **more)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast("cpu", enabled=False):
        found = causal_products(query.to(dtype), key.to(dtype), value.to(dtype), scale)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _forward)
AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
