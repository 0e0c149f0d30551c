"""A key-value cache that is written in place."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


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
