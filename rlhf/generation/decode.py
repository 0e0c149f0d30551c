"""Batched decoding with a key-value cache: prompts of like length together; rows that have ended leave the batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rlhf.distributed.sharding import numel
from rlhf.functional.batching import cheapest_groups, left_pad, position_ids
from rlhf.generation.sampling import inverse_cdf
from rlhf.generation.static import StaticDecoder, is_static
from rlhf.models.kernels.autocast_cache import frozen_cast
from rlhf.models.kernels.onednn_linear import prepacked
from rlhf.perf.flops import key_values


class _Layer(DynamicLayer):
    """Keys and values [B, H, t, d] as a view of room for `length`; DynamicLayer copies all of them at each token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write behind what is there, and return all of it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        done = self.get_seq_length()
        new = key_states.shape[-2]
        if self.room is None or done + new > self.room[0].shape[-2]:
            rooms = self._grown(key_states, done, new), self._grown(value_states, done, new)
            if self.room is not None:
                for room, old in zip(rooms, self.room, strict=True):
                    room[:, :, :done] = old[:, :, :done]
            self.room = rooms
        self.room[0][:, :, done : done + new] = key_states
        self.room[1][:, :, done : done + new] = value_states
        self.keys, self.values = (room[:, :, : done + new] for room in self.room)
        return self.keys, self.values

    def _grown(self, states: Tensor, done: int, new: int) -> Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty(batch, heads, max(self.length, done + new), width)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        if self.get_seq_length():
            done = self.get_seq_length()
            rooms = []
            for room in self.room or ():
                kept = room.new_empty(len(indices), *room.shape[1:])
                kept[:, :, :done] = room[indices, :, :done]
                rooms.append(kept)
            self.room = rooms[0], rooms[1]
            self.keys, self.values = (room[:, :, :done] for room in rooms)


def room_for(model: Any, length: int) -> Cache:
    """An empty cache for sequences of `length` tokens; models with other layers than plain attention get their own."""
    config = model.config.get_text_config(decoder=True)
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return DynamicCache(config=model.config)
    return Cache(layers=[_Layer(length) for _ in range(config.num_hidden_layers)])


# The batch is cut once this share of its rows is left: cutting copies the cache, so not at every ended row.
_COMPACT_AT = 0.75

_LOOK_EVERY = 16  # tokens between two looks at who has ended; each makes a GPU wait for the host

# Bytes that could be moved in the time that a layer's kernels take to start, and in that of one operation.
_MACHINE = {"cpu": (15e6, 0.19), "gpu": (2e8, 0.0066)}


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    u: Tensor,
    eos_ids: Sequence[int],
    temperature: float,
    note: Callable[[int, int], None] = lambda rows, columns: None,
    decoder: StaticDecoder | None = None,
) -> list[list[int]]:
    """Continue each prompt by sampling: B token rows, u float [B, T] -> B responses of at most T tokens.

    A response ends with its first EOS, or is cut after T tokens. Logits processors of the model's own
    generation config play no part: what is sampled from is softmax(logits / temperature). note: told the rows and
    columns of each call of the model. decoder: what keeps memory and captured steps from call to call, on a GPU.
    """
    if is_static(model, max(map(len, prompts)) + u.shape[1]):
        rows = (decoder or StaticDecoder()).decode(model, prompts, u, eos_ids, temperature, note)
        return [_until_eos(row, set(eos_ids)) for row in rows]
    responses: list[list[int]] = [[] for _ in prompts]
    groups = cheapest_groups([len(prompt) for prompt in prompts], len(prompts), _cost(model, u.shape[1]))
    with prepacked(model), frozen_cast(model):
        for group in groups:
            rows = _decode(model, [prompts[i] for i in group], u[group], eos_ids, temperature, note)
            for i, row in zip(group, rows, strict=True):
                responses[i] = _until_eos(row, set(eos_ids))
    return responses


def _cost(model: Any, steps: int) -> Callable[[int, int], float]:
    """Bytes moved, or what takes as long, by decoding `rows` prompts together: weights once a step for all of them,
    keys and values at the width of the longest prompt for each. By constants: what is measured would change from run
    to run, and with it which rows meet and the last bits of their logits.
    """
    config = model.config.get_text_config(decoder=True)
    parameters, size = sum(map(numel, model.parameters())), model.dtype.itemsize
    a_token = key_values(config) * size
    launches, per_flop = _MACHINE["cpu" if model.device.type == "cpu" else "gpu"]
    a_step = parameters * size + config.num_hidden_layers * launches

    def cost(rows: int, longest: int) -> float:
        prefill = rows * longest * 2 * parameters * per_flop
        return prefill + steps * (a_step + rows * (longest + steps / 2) * a_token)

    return cost


def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    u: Tensor,
    eos_ids: Sequence[int],
    temperature: float,
    note: Callable[[int, int], None],
) -> list[list[int]]:
    """As `generate`, in one batch, without the cut at EOS."""
    device = model.device
    ids, mask = left_pad(prompts, eos_ids[0], device)
    u, stop = u.to(device), torch.tensor(list(eos_ids), device=device)
    batch, length = u.shape
    responses = torch.full((batch, length), eos_ids[0], device=device)
    rows = torch.arange(batch, device=device)  # which response each row of the batch is
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    cache, positions = room_for(model, ids.shape[1] + length), position_ids(mask)
    every = 1 if device.type == "cpu" else _LOOK_EVERY
    for t in range(length):
        note(*ids.shape)
        logits = model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        ids = inverse_cdf(logits, u[rows, t], temperature).unsqueeze(1)
        responses[rows, t] = ids[:, 0]  # after its EOS a row goes on until it leaves; that is cut off later
        ended |= torch.isin(ids[:, 0], stop)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
        if (t + 1) % every:
            continue
        left = int((~ended).sum())
        if left == 0:
            break
        if left <= _COMPACT_AT * len(rows):
            keep = (~ended).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            ids, mask, positions, rows, ended = ids[keep], mask[keep], positions[keep], rows[keep], ended[keep]
    return responses.tolist()


def _until_eos(row: list[int], eos_ids: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(row) if token in eos_ids), len(row) - 1)
    return row[: end + 1]
