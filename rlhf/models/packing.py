"""Texts packed without padding: the tokens of a pass in one row, and what all its texts begin with once.

What a layer does to a token by itself is then done for real tokens only; attention looks at padded texts.
Packing: Krell et al. 2021 (arXiv:2107.02027). A shared beginning, as chat templates' system prompts are: under causal
attention its states do not depend on what follows. Dropout, where adapters have it, is drawn once for its tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """B texts padded at the right to L, as N tokens: the first text's, then of each other what is not shared."""

    at: Tensor  # int [B, L]: the token at each place; at padding the first one, which is as good as any
    place: Tensor  # int [N]: of each token, counted over [B, L]
    shared: int  # tokens at the start that are the same in all texts; gradients of theirs are summed

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
    """Copies rows both ways; indexing would add the gradients up, one row after the other."""

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
    shared = _shared(ids, lengths)
    own = columns < lengths.unsqueeze(1)
    own[1:, :shared] = False
    place = own.flatten().nonzero().squeeze(1)
    at = torch.zeros_like(ids)
    at[own] = torch.arange(len(place), device=ids.device)
    at[:, :shared] = columns[:shared]
    return Packed(at, place, shared)


def _shared(ids: Tensor, lengths: Tensor) -> int:
    if len(ids) == 1:
        return 0
    same = (ids == ids[0]).all(0)[: int(lengths.min())]
    return int(same.cumprod(0).sum())
