"""A pass over whole texts without an attention mask: making one would make a GPU wait for the host.

transformers looks at positions and padding before it decides that plain causal attention needs no mask, and each look
makes the host wait for the device. It looks at neither where a key-value cache is given. So the pass is given one that
keeps nothing.
"""

import logging
from functools import cache
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from rlhf.models.unwrap import unwrap_peft

# Kinds of model that take a cache as plain attention does, each held by a test.
PLAIN_KINDS = {"gpt2", "gpt_neox", "llama", "mistral", "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3"}


def is_plain(model: Any) -> bool:
    """Whether a model is transformers' own of a kind in PLAIN_KINDS, with full causal attention in all layers."""
    inner = unwrap_peft(model)
    own = type(inner.base_model).__module__.startswith("transformers.models.")
    layers = set(getattr(inner.config, "layer_types", None) or ["full_attention"])
    return own and inner.config.model_type in PLAIN_KINDS and layers == {"full_attention"}


def unmasked(base: Any, ids: Tensor) -> dict[str, Any]:
    """Arguments of the trunk of a transformers model for texts padded on the right: ids int [B, L]."""
    return without_looks(base, ids) if ids.device.type != "cpu" and is_plain(base) else {"input_ids": ids}


def without_looks(base: Any, ids: Tensor) -> dict[str, Any]:
    """The same for a plain model, so that transformers looks at no number in ids."""
    given: dict[str, Any] = {"past_key_values": _keeps_nothing(base.config.num_hidden_layers)}
    # GPT-2 looks for padding in ids, not in their embeddings.
    if base.config.model_type == "gpt2":
        return given | {"inputs_embeds": base.get_input_embeddings()(ids)}
    return given | {"input_ids": ids}


class _Layer(DynamicLayer):
    """A layer of a cache that is empty and stays so."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What was given."""
        return key_states, value_states


@cache
def _keeps_nothing(layers: int) -> Cache:
    return Cache(layers=[_Layer() for _ in range(layers)])


# Under gradient checkpointing transformers takes caches away from its layers, and says so: this one is not missed.
logging.getLogger("transformers.modeling_layers").addFilter(
    lambda record: "Caching is incompatible with gradient checkpointing" not in record.getMessage()
)
