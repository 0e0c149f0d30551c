"""Decoding with shapes that do not change from token to token, so that a GPU can replay a step as one CUDA graph.

Every tensor of a step stays where it is and is written in place: a step reads nothing on the host, and all its kernels
are the same each time. Rows that have ended leave between steps, at batch sizes that are powers of two.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from rlhf.functional.batching import left_pad, position_ids, to_device, to_device_together
from rlhf.models.kernels.unmasked import is_plain

LOOK_EVERY = 16  # tokens between two looks at who has ended; each makes a GPU wait for the host
_ROOM = 64  # the cache's length is a multiple of it, so that few lengths occur
_LOG = logging.getLogger(__name__)
_GRAPHS = 8  # kept at most: each has its own shapes

Step = Callable[[], None]
Pick = Callable[[Tensor, Tensor, float], Tensor]  # logits, quantiles and temperature to tokens, as `inverse_cdf`
Capture = Callable[[Step], Step]


def cache_size(rows: int, longest: int) -> tuple[int, int]:
    """Rows and columns of the cache for a batch of texts of at most so many tokens: sizes of which few occur."""
    return 1 << (rows - 1).bit_length(), -(-longest // _ROOM) * _ROOM


def is_static(model: Any, longest: int) -> bool:
    """Whether a model decodes texts of at most so many tokens this way."""
    window = getattr(model.config, "sliding_window", None) or longest
    return is_plain(model) and longest <= window


class _Layer(StaticLayer):
    """Keys and values [B, H, L, d] of one layer, written at a column that all layers share."""

    def __init__(self, rows: int, length: int, column: Tensor, dtype: torch.dtype | None) -> None:
        super().__init__(max_cache_len=length)
        self.rows, self.column, self.stored, self.is_prefill = rows, column, dtype, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Prompts: keep them and attend to themselves. A token: keep it and attend to all that is kept."""
        dtype = self.stored or key_states.dtype
        key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if self.is_prefill:
            count, heads, length, width = key_states.shape
            if not self.is_initialized:
                shape = self.rows, heads, self.max_cache_len, width
                self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
                self.is_initialized = True
            assert self.keys is not None
            assert self.values is not None
            self.keys[:count, :, :length] = key_states
            self.values[:count, :, :length] = value_states
            return key_states, value_states
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def head(self, rows: int) -> "_Layer":
        """The same memory, its first rows only."""
        part = _Layer(rows, self.max_cache_len, self.column, self.stored)
        assert self.keys is not None
        assert self.values is not None
        part.keys, part.values = self.keys[:rows], self.values[:rows]
        part.is_initialized, part.is_prefill = True, False
        return part

    def keep(self, rows: Tensor) -> None:
        """Move some rows to the front."""
        for kept in (self.keys, self.values):
            assert kept is not None
            kept[: len(rows)] = kept.index_select(0, rows)


@dataclass
class State:
    """What a step reads and writes; B rows, T response tokens, a cache of L columns."""

    column: Tensor  # int   [1]           where the token that is fed now is kept
    t: Tensor  # int   [1]           which token of the response is sampled
    ids: Tensor  # int   [B, 1]        the token to feed
    positions: Tensor  # int   [B, 1]        its position
    mask: Tensor  # float [B, 1, 1, L]  0 where kept keys are seen, -inf elsewhere
    u: Tensor  # float [B, T]        quantiles to sample at
    responses: Tensor  # int   [B, T]
    ended: Tensor  # bool  [B]
    stop: Tensor  # int   [S]           ids that end a response
    layers: list[_Layer]

    def __post_init__(self) -> None:
        self.cache = Cache([*self.layers])

    def tensors(self) -> list[Tensor]:
        """Those that a step changes, except the cache: what it writes there is written again before it is read."""
        return [self.column, self.t, self.ids, self.positions, self.mask, self.responses, self.ended]

    def head(self, rows: int) -> "State":
        """The same memory, its first rows only."""
        names = ("ids", "positions", "mask", "u", "responses", "ended")
        parts: dict[str, Any] = {name: getattr(self, name)[:rows] for name in names}
        return replace(self, **parts, layers=[layer.head(rows) for layer in self.layers])

    def keep(self, rows: Tensor) -> None:
        """Move some rows to the front."""
        for x in (self.ids, self.positions, self.mask, self.u, self.responses, self.ended):
            x[: len(rows)] = x.index_select(0, rows)
        for layer in self.layers:
            layer.keep(rows)


def no_routers(model: Any) -> dict[str, bool]:
    """An argument for mixtures of experts whose config asks for the loss that balances them: sampling has none."""
    return {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}


def decode_step(model: Any, state: State, temperature: float, pick: Pick) -> None:
    """Feed each row's last token and sample its next one, all in place."""
    state.mask.index_fill_(3, state.column, 0.0)
    logits = model(
        input_ids=state.ids,
        attention_mask=state.mask,
        position_ids=state.positions,
        past_key_values=state.cache,
        use_cache=True,
        logits_to_keep=1,
        **no_routers(model),
    ).logits[:, -1]
    sample(logits, state, temperature, pick)
    state.column.add_(1)
    state.positions.add_(1)


def sample(logits: Tensor, state: State, temperature: float, pick: Pick) -> None:
    """The next token of each row, from float [B, V], by its quantile."""
    token = pick(logits, state.u.index_select(1, state.t).squeeze(1), temperature).unsqueeze(1)
    state.ids.copy_(token)
    state.responses.index_copy_(1, state.t, token)
    state.ended.logical_or_((token == state.stop).any(1))
    state.t.add_(1)


def cuda_graph() -> Capture:
    """How steps are captured on a CUDA device; all graphs share one pool of memory, since one runs at a time."""
    pools: list[Any] = []

    def capture(step: Step) -> Step:
        pool = pools[0] if pools else torch.cuda.graph_pool_handle()
        pools[:] = [pool]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # what is set up at a first call must not be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's among them, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
        return graph.replay

    return capture


class StaticDecoder:
    """Decodes batches, each in one group; keeps its memory, and its captured steps, from batch to batch."""

    def __init__(self, capture: Capture | None = None) -> None:
        """capture: makes a step that can be replayed of one that runs; None: steps run as they are."""
        self.capture = capture
        self._state: tuple[tuple[Any, ...], State] | None = None
        self._steps: dict[tuple[Any, ...], Step] = {}

    def decode(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        u: Tensor,
        eos_ids: Sequence[int],
        temperature: float,
        pick: Pick,
    ) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """B prompts, u float [B, T] -> B rows of T tokens; what comes after a row's first EOS is any.

        Returns rows and columns of each call of the model, too.
        """
        device, (batch, length) = model.device, u.shape
        ids, mask = to_device_together(left_pad(prompts, eos_ids[0]), device)
        rows, columns = cache_size(batch, ids.shape[1] + length)
        state = self._made(model, rows, columns, u, eos_ids)
        calls = [(ids.shape[0], ids.shape[1])]
        self._prefill(model, state, ids, mask, to_device(u, device), temperature, pick)
        responses = torch.zeros(batch, length, dtype=torch.long, device=device)
        where = torch.arange(batch, device=device)  # which response each of the first rows is
        part, step = state, self._step(model, state, temperature, pick)
        for t in range(1, length):
            calls.append((rows, 1))
            step()
            if (t + 1) % LOOK_EVERY or t + 1 == length:
                continue
            left = [i for i, ended in enumerate(part.ended[: len(where)].tolist()) if not ended]
            if not left:
                break
            smaller = cache_size(len(left), 1)[0]
            if smaller < rows:
                responses.index_copy_(0, where, part.responses[: len(where)])
                # With the rows that go on come some that have ended, to make up the number.
                others = sorted(set(range(len(where))) - set(left))[: smaller - len(left)]
                kept = to_device(torch.tensor(left + others), device)
                part.keep(kept)
                where, rows = where.index_select(0, kept), smaller
                part = state.head(rows)
                step = self._step(model, part, temperature, pick)
        responses.index_copy_(0, where, part.responses[: len(where)])
        if self.capture is None:
            self._state = None
        found: list[list[int]] = responses.tolist()
        return found, calls

    def _made(self, model: Any, rows: int, length: int, u: Tensor, eos_ids: Sequence[int]) -> State:
        """Memory for so many rows: that of the last batch where it has the same shape."""
        device, steps = model.device, u.shape[1]
        kind = device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = id(model), rows, length, steps, tuple(eos_ids), dtype
        if self._state is None or self._state[0] != key:
            self._state, self._steps = None, {}  # before the new memory is taken
            column = torch.zeros(1, dtype=torch.long, device=device)
            layers = [_Layer(rows, length, column, dtype) for _ in range(model.config.num_hidden_layers)]
            self._state = (
                key,
                State(
                    column=column,
                    t=torch.zeros_like(column),
                    ids=column.new_zeros(rows, 1),
                    positions=column.new_zeros(rows, 1),
                    mask=torch.zeros(rows, 1, 1, length, dtype=dtype or model.dtype, device=device),
                    u=torch.zeros(rows, steps, device=device),
                    responses=column.new_zeros(rows, steps),
                    ended=torch.zeros(rows, dtype=torch.bool, device=device),
                    stop=to_device(torch.tensor(list(eos_ids)), device),
                    layers=layers,
                ),
            )
        return self._state[1]

    def _prefill(
        self, model: Any, state: State, ids: Tensor, mask: Tensor, u: Tensor, temperature: float, pick: Pick
    ) -> None:
        """Feed the prompts, int [B, P] with bool [B, P], and sample each first token; rows beyond B have ended."""
        count, width = ids.shape
        positions = position_ids(mask)
        square = torch.ones(width, width, dtype=torch.bool, device=ids.device)
        # A pad sees itself: a row of the softmax with nothing in it would be NaN.
        seen = (mask.unsqueeze(1) & square.tril()) | torch.eye(width, dtype=torch.bool, device=ids.device)
        for layer in state.layers:
            layer.is_prefill = True
        logits = model(
            input_ids=ids,
            attention_mask=seen.unsqueeze(1),
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
            **no_routers(model),
        ).logits[:, -1]
        for layer in state.layers:
            layer.is_prefill = False
        state.t.zero_()
        state.column.fill_(width)
        state.mask.fill_(-torch.inf)
        state.mask[:count, 0, 0, :width].masked_fill_(mask, 0.0)
        state.u[:count] = u
        state.positions.zero_()  # rows beyond B count on, too, and must not leave the model's positions
        state.positions[:count] = positions[:, -1:] + 1
        state.ended.fill_(True)
        state.ended[:count] = False
        sample(logits, state.head(count), temperature, pick)

    def _step(self, model: Any, state: State, temperature: float, pick: Pick) -> Step:
        def step() -> None:
            decode_step(model, state, temperature, pick)

        if self.capture is None:
            return step
        key = len(state.ids), temperature
        if key not in self._steps:
            if len(self._steps) >= _GRAPHS:
                self._steps.pop(next(iter(self._steps)))
            kind = model.device.type
            on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

            def uncached() -> None:
                # What autocast keeps of its casts is gone at its end, and a graph would read it still.
                with torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False):
                    step()

            kept = [x.clone() for x in state.tensors()]
            try:
                self._steps[key] = self.capture(uncached)
            except RuntimeError as error:  # what CUDA does not let through, or has no memory for
                self.capture, self._steps = None, {}
                reason = " ".join(str(error).split())[:200]
                _LOG.warning("cuda_graphs: a decoding step could not be captured, so each is launched: %s", reason)
            for x, before in zip(state.tensors(), kept, strict=True):
                x.copy_(before)
        return self._steps.get(key, step)
