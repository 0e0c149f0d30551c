"""Attention on a CPU: of packed texts, and in bf16 by matrix products, since PyTorch's own kernel is slow there.

With their gradient products are 2 to 4 times as fast on 2 cores (60 to 500 tokens); in float32 they are not. They
keep the probabilities for the backward pass, so that memory grows by the square of the length: not for long texts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel


@dataclass(frozen=True)
class Packed:
    """B texts padded at the right to L, as N tokens: the first text's, then of each other what no earlier text has.

    So what texts begin with in common, a system prompt or the prompt of a pair, is there once.
    """

    at: Tensor  # int [B, L]: the token at each place; at padding the first one, which is as good as any
    place: Tensor  # int [N]: of each token, counted over [B, L]
    shared: int  # tokens at the start that are the same in all texts; gradients of theirs are summed
    again: Tensor  # int [M]: places of further tokens that an earlier text has; their gradients are added to its

    @property
    def positions(self) -> Tensor:
        """int [N]: of each token in its text."""
        return self.place % self.at.shape[1]

    def collect(self, padded: Tensor) -> Tensor:
        """[B, L, ...] -> [N, ...]; padding gets no gradient."""
        return _Collect.apply(padded.flatten(0, 1), self)

    def spread(self, tokens: Tensor) -> Tensor:
        """[N, ...] -> [B, L, ...]; what reaches padding from there is for the caller to leave alone."""
        return _Spread.apply(tokens, self).unflatten(0, self.at.shape)


class _Spread(torch.autograd.Function):
    """Copies rows both ways; indexing would add all gradients up, one row after the other."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return tokens.index_select(0, packed.at.flatten())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        packed, grad = ctx.packed, grads[0]
        found = grad.index_select(0, packed.place)
        if packed.shared:
            found[: packed.shared] = grad.unflatten(0, packed.at.shape)[:, : packed.shared].sum(0)
        if len(packed.again):
            found.index_add_(0, packed.at.flatten()[packed.again], grad.index_select(0, packed.again))
        return found, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return places.index_select(0, packed.place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        packed, grad = ctx.packed, grads[0]
        found = grad.new_zeros(packed.at.numel(), *grad.shape[1:])
        return found.index_copy_(0, packed.place, grad), None


def pack(ids: Tensor, lengths: Tensor) -> Packed:
    """ids int [B, L] padded at the right, lengths int [B] of at least 1 and at most L."""
    columns = torch.arange(ids.shape[1], device=ids.device)
    common, earlier = _beginnings(ids, lengths)
    known = columns < common.unsqueeze(1)
    own = (columns < lengths.unsqueeze(1)) & ~known
    place = own.flatten().nonzero().squeeze(1)
    at = torch.zeros_like(ids)
    at[own] = torch.arange(len(place), device=ids.device)
    for row, (width, other) in enumerate(zip(common.tolist(), earlier.tolist(), strict=True)):
        at[row, :width] = at[other, :width]
    shared = int(common[1:].min()) if len(ids) > 1 else 0
    known[:, :shared] = False
    return Packed(at, place, shared, known.flatten().nonzero().squeeze(1))


def _beginnings(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Of each text, how many tokens it begins with as an earlier one does, and which, int [B] twice; 0 and 0 of none.

    Of earlier texts that have as much in common with it, the first.
    """
    ends = torch.arange(ids.shape[1], device=ids.device) >= torch.minimum(lengths.unsqueeze(1), lengths).unsqueeze(-1)
    differ = ends | (ids.unsqueeze(1) != ids)
    differ = torch.cat([differ, differ.new_ones(*differ.shape[:2], 1)], -1)
    common = differ.to(torch.uint8).argmax(-1).tril(-1)  # the first place where two texts differ
    found = common.max(1)
    return found.values, found.indices


_NAME = "rlhf_cpu"  # a name of this package's in transformers' table of attention functions

# Kinds of model that go by transformers' table; others also look at the name "sdpa" (Falcon, DeepSeek-V3.2).
_KINDS = {"gpt2", "gpt_neox", "llama", "mistral", "olmo", "phi3", "qwen2", "qwen3"}

_LONGEST = 512

_NO_MATTER = {"position_ids", "use_cache", "sliding_window"}  # of a window that cuts anything off, the mask tells

_SDPA = AttentionInterface()["sdpa"]


def use_cpu_attention(model: PreTrainedModel) -> None:
    """Let a model that runs PyTorch's attention run this one, which leaves to PyTorch what is not for it.

    A model of a kind that this was not tried with stays as it is, as does one whose code is not transformers' own: it
    may not pass on what a call adds.
    """
    own = type(model.base_model).__module__.startswith("transformers.models.")
    if own and model.config.model_type in _KINDS and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_NAME)


def packs(model: PreTrainedModel, longest: int) -> bool:
    """Whether a model, without a PEFT one around it, takes texts of at most so many tokens in one row.

    `packed` says beside the row which tokens are whose.
    """
    window = getattr(model.config, "sliding_window", None) or longest
    return model.config._attn_implementation == _NAME and model.device.type == "cpu" and longest <= window


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
    packed: Packed | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`. packed: what the one row given holds, with which the mask does not matter."""
    if packed is None:
        return _attend(module, query, key, value, attention_mask, **options)
    dtype = computed_in(query)
    query, key, value = (packed.spread(x[0].transpose(0, 1).to(dtype)).transpose(1, 2) for x in (query, key, value))
    found, _ = _attend(module, query, key, value, None, **options)
    return packed.collect(found).unsqueeze(0), None


def _attend(
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
    """By products where they are for it, otherwise transformers' `sdpa`."""
    length, causal = query.shape[2], getattr(module, "is_causal", True) if is_causal is None else is_causal
    square = causal and attention_mask is None and 1 < length == key.shape[2] <= _LONGEST
    # An option of a kind of model not thought of here may change the values: a cap on scores, a sink.
    plain = not dropout and all(x is None for name, x in options.items() if name not in _NO_MATTER)
    bf16_on_cpu = query.device.type == "cpu" and computed_in(query) == torch.bfloat16
    if plain and _one_of_groups(query, key, attention_mask):
        return _attend_in_groups(query, key, value, attention_mask, scaling), None
    if not (square and plain and bf16_on_cpu and query.shape[-1] == value.shape[-1]):
        more: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **options}
        return _SDPA(module, query, key, value, attention_mask, **more)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast("cpu", enabled=False):
        found = causal_products(query.bfloat16(), key.bfloat16(), value.bfloat16(), scale)
    return found.transpose(1, 2).contiguous(), None


def _one_of_groups(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether one new token attends, several heads to each head of keys, with a mask for all heads or without one."""
    heads, key_heads = query.shape[1], key.shape[1]
    alike = mask is None or (mask.ndim == 4 and mask.shape[1] == 1)
    return alike and query.shape[2] == 1 and key_heads < heads and heads % key_heads == 0 and query.device.type == "cpu"


def _attend_in_groups(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """[B, H, 1, d], [B, K, L, d] twice -> [B, 1, H, d]: a group of heads as the queries of its head of keys.

    transformers repeats keys and values for each head of a group where there is a mask.
    """
    batch, heads, _, width = query.shape
    query = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    found = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(batch, 1, heads, found.shape[-1])


def computed_in(states: Tensor) -> torch.dtype:
    """What products are computed in."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


AttentionInterface.register(_NAME, _forward)

AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
