"""Sample responses with a key-value cache: prompts of similar length together; finished rows leave the batch.

What is sampled depends on seed, step and prompt, and on nothing else: not on batch, rank or order.
"""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rlhf.functional.batching import Cost, cheapest_groups, left_pad, position_ids
from rlhf.generation.static import LOOK_EVERY, Pick, StaticDecoder, is_static
from rlhf.models.actor_critic import packed_logits
from rlhf.models.kernels.attention import computed_in, packs
from rlhf.models.kernels.autocast_cache import frozen_cast
from rlhf.models.kernels.onednn_linear import decoding_layouts
from rlhf.models.unwrap import unwrap_peft
from rlhf.perf.work import key_values

# The batch shrinks once this share of its rows is left: that copies the cache, so not at every finished row.
_COMPACT_AT = 0.75
# Bytes that could be moved in the time that a layer's kernels take to start, and in that of one operation.
_MACHINE = {"cpu": (15e6, 0.06), "gpu": (2e8, 0.0066)}
_WHOLE = 2.0**40


class Samples(NamedTuple):
    """Responses, and the calls of the model that made them."""

    responses: list[list[int]]  # token ids, the first EOS included
    calls: list[tuple[int, int]]  # rows and columns of each call


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    u: Tensor,
    eos_ids: Sequence[int],
    temperature: float,
    decoder: StaticDecoder | None = None,
    suppress_tokens: Tensor | None = None,
) -> list[list[int]]:
    """The responses of `decode`; model: a PEFT one as well."""
    return decode(unwrap_peft(model), prompts, u, eos_ids, temperature, decoder, suppress_tokens).responses


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    u: Tensor,
    eos_ids: Sequence[int],
    temperature: float,
    decoder: StaticDecoder | None = None,
    suppress_tokens: Tensor | None = None,
    sampler: Pick | None = None,
) -> Samples:
    """Continue each prompt by sampling: B token rows, u float [B, T] -> B responses of at most T tokens.

    A response ends with its first EOS, or is truncated after T tokens. Logits processors of the model's own generation
    config are not used: responses come from softmax(logits / temperature). model: without a PEFT one around it.
    decoder: keeps memory and captured steps from call to call, on a GPU. suppress_tokens: ids that are never sampled,
    int [K]. sampler: in place of `inverse_cdf`, which takes the token at quantile u.
    """
    choose = sampler or inverse_cdf

    def pick(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
        if suppress_tokens is not None:
            logits.index_fill_(-1, suppress_tokens, -torch.inf)
        return choose(logits, u, temperature)

    if model.device.type != "cpu" and is_static(model, max(map(len, prompts)) + u.shape[1]):
        decoder = decoder or StaticDecoder()
        rows, calls = decoder.decode(model, prompts, u, eos_ids, temperature, pick)
        return Samples([_until_eos(row, set(eos_ids)) for row in rows], calls)
    responses: list[list[int]] = [[] for _ in prompts]
    calls = []
    groups = cheapest_groups([len(prompt) for prompt in prompts], len(prompts), _cost(model, u.shape[1]))
    frozen = frozen_cast(model) if torch.is_autocast_enabled(model.device.type) else nullcontext()
    with decoding_layouts(model), frozen:
        for group in groups:
            rows = _decode_group(model, [prompts[i] for i in group], u[group], eos_ids, temperature, pick, calls)
            for i, row in zip(group, rows, strict=True):
                responses[i] = _until_eos(row, set(eos_ids))
    return Samples(responses, calls)


def _cost(model: Any, steps: int) -> Cost:
    """Bytes moved, or what takes as long, by decoding `rows` prompts together: weights once per step for all of them,
    keys and values at the width of the longest prompt for each. By constants: what is measured would change from run
    to run, and with it which rows meet and the last bits of their logits.
    """
    config = model.config.get_text_config(decoder=True)
    parameters, size = sum(parameter.numel() for parameter in model.parameters()), model.dtype.itemsize
    a_token = key_values(config) * size
    launches, per_flop = _MACHINE["cpu" if model.device.type == "cpu" else "gpu"]
    a_step = parameters * size + config.num_hidden_layers * launches
    # rows * longest * 2 * parameters * per_flop, and at each step a_step + rows * (longest + steps / 2) * a_token
    return Cost(steps * a_step, 2 * parameters * per_flop + steps * a_token, steps * steps / 2 * a_token)


def _decode_group(
    model: Any,
    prompts: Sequence[Sequence[int]],
    u: Tensor,
    eos_ids: Sequence[int],
    temperature: float,
    pick: Pick,
    calls: list[tuple[int, int]],
) -> list[list[int]]:
    """One batch: B rows of T tokens; what comes after a row's first EOS is any. Appends to calls."""
    device = model.device
    ids, mask = left_pad(prompts, eos_ids[0], device)
    u, stop = u.to(device), torch.tensor(list(eos_ids), device=device)
    batch, length = u.shape
    responses = torch.full((batch, length), eos_ids[0], device=device)
    rows = torch.arange(batch, device=device)  # which response each row of the batch is
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    cache, positions = room_for(model, ids.shape[1] + length), position_ids(mask)
    every = 1 if device.type == "cpu" else LOOK_EVERY
    is_state = _keeps_states(model)
    kept: dict[str, Any] = {"cache_params" if is_state else "past_key_values": cache}
    if getattr(model.config, "output_router_logits", False):  # for the loss that balances experts: sampling has none
        kept["output_router_logits"] = False
    for t in range(length):
        if t == 0 and type(cache) is Cache and packs(model, ids.shape[1]):
            logits = _read_packed(model, ids, mask, cache, calls)
        else:
            calls.append((ids.shape[0], ids.shape[1]))
            logits = model(
                input_ids=ids,
                # A state has been read by what went into it, so that only new tokens have a mask.
                attention_mask=mask[:, -ids.shape[1] :].long() if is_state else mask.long(),
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **kept,
            ).logits[:, -1]
        ids = pick(logits, u[rows, t], temperature).unsqueeze(1)
        responses[rows, t] = ids[:, 0]  # a finished row continues until it leaves; `_until_eos` drops that
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
            # Layers that keep a state instead of keys have no other way to drop rows.
            cache.reorder_cache(cast(torch.LongTensor, keep))
            ids, mask, positions, rows, ended = ids[keep], mask[keep], positions[keep], rows[keep], ended[keep]
    return responses.tolist()


def _read_packed(model: Any, ids: Tensor, mask: Tensor, cache: Cache, calls: list[tuple[int, int]]) -> Tensor:
    """The logits after each prompt, float [B, V], and the cache filled: prompts without padding, their beginnings once.

    ids int [B, L], mask bool [B, L]: padded on the left.
    """
    lengths, columns = mask.sum(1), torch.arange(ids.shape[1], device=ids.device)
    pads = (ids.shape[1] - lengths).unsqueeze(1)
    texts = ids.gather(1, (columns + pads).clamp(max=ids.shape[1] - 1))
    logits, at = packed_logits(model, texts, lengths, cache)
    calls.append((1, cache.get_seq_length()))
    for layer in cast(list[_Layer], cache.layers):
        layer.spread(at.gather(1, (columns - pads).clamp(min=0)))
    return logits


def _keeps_states(model: Any) -> bool:
    """Whether all layers keep a state in place of keys and values, as Mamba's do, which call their cache otherwise."""
    return "cache_params" in signature(model.forward).parameters


def _until_eos(row: list[int], eos_ids: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(row) if token in eos_ids), len(row) - 1)
    return row[: end + 1]


def uniforms(seed: int, step: int, prompt_ids: Sequence[str], length: int) -> Tensor:
    """One number in [0, 1) for each token of each prompt: float32 [B, length], on the CPU.

    Every prompt has its own stream, seeded by (seed, step, its id).
    """
    rows = [
        np.random.default_rng((seed, step, int.from_bytes(hashlib.sha256(p.encode()).digest()[:8]))).random(
            length, dtype=np.float32
        )
        for p in prompt_ids
    ]
    return torch.from_numpy(np.stack(rows))


def inverse_cdf(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """The token at quantile u of softmax(logits / temperature): float [B, V], float [B] -> int [B]."""
    scaled = logits.float()
    scaled = scaled / temperature if temperature != 1 else scaled
    probabilities = scaled.softmax(-1)
    if logits.device.type == "cpu":
        cumulative = probabilities.cumsum(-1)
        # Scaled by the last entry, since a float32 sum over a vocabulary misses 1 by more than u's resolution.
        target = (u * cumulative[:, -1]).unsqueeze(1)
    else:
        cumulative, target = in_whole_numbers(probabilities, u)
    # right=True: the first token whose cumulative probability exceeds u, so one of probability 0 never comes.
    token = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return token.clamp(max=logits.shape[1] - 1)


def in_whole_numbers(probabilities: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative probabilities int [B, V] and quantiles int [B, 1], in units of 2^-40.

    Such a sum is exact in any order: CUDA has a deterministic one, which it has not of floats. On a CPU it takes twice
    the time of a sum of floats.
    """
    cumulative = (probabilities * _WHOLE).long().cumsum(-1)
    return cumulative, (u.double() * cumulative[:, -1]).long().unsqueeze(1)


class _Layer(DynamicLayer):
    """Keys and values [B, H, t, d] as a view of room for `length`; DynamicLayer copies all of them at each token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write behind what is there, and return all of it, in the precision that attention computes in."""
        key_states, value_states = (states.to(computed_in(states)) for states in (key_states, value_states))
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

    def spread(self, at: Tensor) -> None:
        """Keys and values of packed tokens, [1, H, N, d], as those of B texts, [B, H, L, d]. at int [B, L]: tokens."""
        rooms = []
        for states in cast(tuple[Tensor, Tensor], (self.keys, self.values)):
            texts = states[0].index_select(1, at.flatten()).unflatten(1, at.shape).transpose(0, 1)
            room = texts.new_empty(*texts.shape[:2], self.length, texts.shape[3])
            room[:, :, : at.shape[1]] = texts
            rooms.append(room)
        self.room = rooms[0], rooms[1]
        self.keys, self.values = (room[:, :, : at.shape[1]] for room in rooms)

    def _grown(self, states: Tensor, done: int, new: int) -> Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty(batch, heads, max(self.length, done + new), width)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep some rows of the batch."""
        if self.get_seq_length():
            done = self.get_seq_length()
            rooms = []
            for room in self.room or ():
                kept = room.new_empty(len(beam_idx), *room.shape[1:])
                kept[:, :, :done] = room[beam_idx, :, :done]
                rooms.append(kept)
            self.room = rooms[0], rooms[1]
            self.keys, self.values = (room[:, :, :done] for room in rooms)


def room_for(model: Any, length: int) -> Cache:
    """An empty cache for sequences of `length` tokens; models with other layers than plain attention get their own."""
    config = model.config.get_text_config(decoder=True)
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return DynamicCache(config=model.config)
    return Cache(layers=[_Layer(length) for _ in range(config.num_hidden_layers)])
