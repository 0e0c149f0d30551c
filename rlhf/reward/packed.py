"""A reward model's own forward pass on a CPU, over texts without padding, of which a pair's prompt is computed once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from rlhf.models.actor_critic import packed_arguments, trunk_of
from rlhf.models.kernels.attention import Packed, packs
from rlhf.models.unwrap import Model, unwrap_peft


@contextmanager
def packed_passes(model: Model) -> Iterator[None]:
    """Inside, the trunk gets batches padded on the right as one row of their tokens, and gives back padded states.

    For a model that something else calls, as TRL's trainer does, in a wrapper of an engine or without one. Everything
    that `packs` or this file does not know goes through as it is.
    """
    base: Any = unwrap_peft(model)
    under_way: list[Packed | None] = []

    def before(trunk: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = given | dict(zip(["input_ids"], args, strict=False))
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        plain = len(args) < 2 and all(given.get(name) is None or given[name] is False for name in _OTHERS)
        if plain and ids is not None and mask is not None and packs(base, ids.shape[1]) and _right_padded(mask):
            packed, more = packed_arguments(ids, mask.sum(1))
            under_way.append(packed)
            return (), arguments | more
        under_way.append(None)
        return args, given

    def after(trunk: Any, args: Any, output: Any) -> None:
        packed = under_way.pop()
        if packed is not None:
            output.last_hidden_state = packed.spread(output.last_hidden_state[0])

    trunk = trunk_of(base)
    hooks = [trunk.register_forward_pre_hook(before, with_kwargs=True), trunk.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# Arguments with which a batch goes through as it is.
_OTHERS = (
    "packed",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
    "output_hidden_states",
    "output_attentions",
)


def _right_padded(mask: Tensor) -> bool:
    """Whether of a mask [B, L] each row has at least one token, at its left."""
    return mask.ndim == 2 and bool(mask[:, 0].all()) and bool((mask[:, 1:] <= mask[:, :-1]).all())
