"""What is computed for response tokens, and for no other position: states, logits a few at a time, log-probs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf.functional.batching import to_device
from rlhf.models.kernels.attention import pack, packs
from rlhf.models.kernels.unmasked import unmasked

_MOST_LOGITS = 2**26  # numbers held at once: 256 MiB in float32


@dataclass(frozen=True)
class Texts:
    """B prompts with their responses, padded on the right: causal attention then needs no mask.

    N counts their response tokens, row by row. Which is where is planned on the host and copied to the device once for
    many passes, so that no pass waits for the host.
    """

    ids: Tensor  # int [B, L]
    lengths: Tensor  # int [B] tokens of prompt and response
    before: Tensor  # int [N] in [B * L]: the position whose state predicts the token
    tokens: Tensor  # int [N]: the token itself
    last: Tensor  # int [B] in [B * L]: the last token of the text
    places: Tensor  # int [N]: the token in the grid [rows, T] that the rows were taken from
    rows: Tensor  # int [B]: the rows of that grid

    def at_tokens(self, per_position: Tensor) -> Tensor:
        """[B, L, ...] -> [N, ...]: what predicts each response token."""
        return _Select.apply(per_position.flatten(0, 1), self.before)


class _Select(torch.autograd.Function):
    """Rows by number, each at most once: their gradients are copied back, where indexing would add them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(0, index, grads[0]), None


def token_rows(ids: Tensor, mask: Tensor, n_response: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts padded on the left and responses on the right, int and bool [B, P+T], as token ids on the host."""
    rows = list(zip(ids.cpu(), mask.cpu(), strict=True))
    prompts = [row[:-n_response][real[:-n_response]].tolist() for row, real in rows]
    return prompts, [row[-n_response:][real[-n_response:]].tolist() for row, real in rows]


def texts_of(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    width: int,
    device: torch.device | str,
) -> list[Texts]:
    """The rows of each group as one pass; all passes are copied to the device together.

    prompts (of at least one token) and responses: token ids of each row; groups: row numbers; width: T, the columns of
    the grid that `places` counts in.
    """
    parts: list[np.ndarray] = []
    for group in groups:
        before, answers = [len(prompts[i]) for i in group], [len(responses[i]) for i in group]
        lengths = np.array(before) + answers
        ids = np.zeros((len(group), lengths.max()), dtype=np.int64)
        for row, i in zip(ids, group, strict=True):
            row[: len(prompts[i])] = prompts[i]
            row[len(prompts[i]) : len(prompts[i]) + len(responses[i])] = responses[i]
        start = np.arange(len(group)) * ids.shape[1]
        step = np.concatenate([np.arange(n) for n in answers])
        at = np.repeat(start + before, answers) + step
        places = np.repeat(np.array(group) * width, answers) + step
        parts += [ids, lengths, at - 1, ids.reshape(-1)[at], start + lengths - 1, places, np.array(group)]
    together = torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts]))
    pieces = to_device(together, device).split([part.size for part in parts])
    shaped = [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
    return [Texts(*shaped[i : i + 7]) for i in range(0, len(shaped), 7)]


def trunk_states(base: Any, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The last states of a transformers model below its head: ids int [B, L], right-padded -> float [B, L, d].

    lengths: int [B], of the texts; with them a model that can computes no padding, where states are then any.
    """
    if lengths is None or not packs(base, ids.shape[1]):
        return base.base_model(**unmasked(base, ids), use_cache=False).last_hidden_state
    packed = pack(ids, lengths)
    given = {
        "input_ids": ids.flatten()[packed.place].unsqueeze(0),
        "position_ids": packed.positions.unsqueeze(0),
        "attention_mask": ids.new_ones(1, 1, 1, 1),  # of four dimensions it is passed on as it is: none is made
    }
    return packed.spread(base.base_model(**given, use_cache=False, packed=packed).last_hidden_state[0])


class _Output(BaseModelOutputWithPast):
    """Whatever else a model's own kind of output would hold is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """In a trunk's place: answers with states that are there already."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return _Output(last_hidden_state=self.states)


@contextmanager
def _trunk_replaced(base: Any, by: nn.Module) -> Iterator[None]:
    name, trunk = base.base_model_prefix, base.base_model
    setattr(base, name, by)
    try:
        yield
    finally:
        setattr(base, name, trunk)


def head_logits(base: Any, states: Tensor) -> Tensor:
    """A causal model's logits of trunk states: float [N, d] -> [N, V].

    By the model's own forward pass, since some scale or cap what their output embeddings give.
    """
    with _trunk_replaced(base, _Given(states.unsqueeze(0))):
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        return base(input_ids=ids, use_cache=False).logits.squeeze(0)


def _dot(one: Tensor, two: Tensor) -> Tensor:
    """float32 [..., V] twice -> [...], without a third; autocast would round both to bf16 first."""
    with torch.autocast(one.device.type, enabled=False):
        return torch.linalg.vecdot(one, two)


class _TokenLogp(torch.autograd.Function):
    """Log-prob and entropy from one softmax, which is also all that the backward pass needs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        scaled = logits.float()
        scaled = scaled / temperature if temperature != 1 else scaled
        p = scaled.softmax(-1)
        # The largest probability is 1 over what all were divided by: no second sum of exponentials.
        log_total = scaled.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
        logp = (scaled.gather(-1, tokens.unsqueeze(-1)) - log_total).squeeze(-1)
        entropy = log_total.squeeze(-1) - _dot(p, scaled)
        ctx.save_for_backward(p, tokens)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        p, tokens = ctx.saved_tensors
        grad = (grads[0] / ctx.temperature).unsqueeze(-1)
        p.mul_(-grad)  # in place: it is large, and of no further use
        p.scatter_add_(-1, tokens.unsqueeze(-1), grad)
        return p.to(ctx.dtype), None, None


def logp_of(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of tokens int [...] under logits float [..., V] / temperature, and the entropy, in nats.

    Returns float32 [...] twice; the entropy carries no gradient.
    """
    return _TokenLogp.apply(logits, tokens, temperature)


def exact_kl(logits: Tensor, other: Tensor, temperature: float) -> Tensor:
    """KL of softmax(logits / temperature) to softmax(other / temperature), nats: float [..., V] twice -> [...]."""
    log_p, log_q = ((x.float() / temperature).log_softmax(-1) for x in (logits, other))
    return _dot(log_p.exp(), log_p.sub_(log_q))


def in_chunks(of: Callable[..., tuple[Tensor, ...]], vocabulary: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """of(*inputs), each [N, ...], a few rows at a time, so that N x vocabulary is never whole in memory.

    Where gradients are asked for and one call does not do, each is made once more in the backward pass.
    """
    size = max(1, _MOST_LOGITS // vocabulary)
    if len(inputs[0]) <= size:
        return of(*inputs)
    parts = zip(*(x.split(size) for x in inputs), strict=True)
    if torch.is_grad_enabled():
        done = [checkpoint(of, *part, use_reentrant=False) for part in parts]
    else:
        done = [of(*part) for part in parts]
    return tuple(torch.cat(column) for column in zip(*done, strict=True))
