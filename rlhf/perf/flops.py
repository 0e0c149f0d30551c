"""What a pass through a model needs at least: FLOPs and bytes, from its layers' shapes and the texts' lengths."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from rlhf.distributed.sharding import numel
from rlhf.models.unwrap import unwrap_peft


@dataclass(frozen=True)
class Flops:
    """Of one model, as its adapters are now. A multiply and an add are two; norms and activations are left out.

    Linear layers count, and attention, causal and over texts without padding. The head counts apart: only for
    the positions that need it. Experts of a mixture, which are no linear layers in transformers, are not seen.
    """

    trained: int  # elements of the trunk's matrices that have a gradient
    frozen: int  # and of those that have none
    attention: int  # FLOPs a squared token of a text: half of the square, two products
    head: int  # elements of the output embeddings; 0 where there are none
    head_trained: bool
    key_values: int  # numbers that the cache keeps a token
    layers: tuple[tuple[int, int], ...]  # of each matrix, the head's too: elements as stored, bytes of one

    @classmethod
    def of(cls, model: nn.Module) -> "Flops":
        """Read off a transformers model, or a PEFT one with the adapters that are active."""
        base = unwrap_peft(model)
        trunk, config = list(_linear_layers(base.base_model)), base.config.get_text_config(decoder=True)
        head = base.get_output_embeddings()
        layers = trunk if head is None else [*trunk, head]
        trained = sum(_elements(layer) for layer in trunk if layer.weight.requires_grad)
        heads, width = getattr(config, "num_attention_heads", 0), head_width(config)
        return cls(
            trained=trained,
            frozen=sum(map(_elements, trunk)) - trained,
            attention=2 * config.num_hidden_layers * heads * width,
            head=_elements(head) if head is not None else 0,
            head_trained=head is not None and head.weight.requires_grad,
            key_values=key_values(config),
            layers=tuple((numel(x.weight), x.weight.element_size()) for x in layers),
        )

    @property
    def matrices(self) -> int:
        """Elements of the trunk's matrices."""
        return self.trained + self.frozen

    def forward(self, lengths: Sequence[int], responses: int = 0, again: Sequence[int] = ()) -> float:
        """A pass over texts of these lengths, logits for so many tokens.

        again: lengths of beginnings that an earlier text of the pass has, too: they count once.
        """
        tokens, square = _distinct(lengths, again)
        return 2.0 * (self.matrices * tokens + self.head * responses) + self.attention * square

    def training(self, lengths: Sequence[int], responses: int = 0, again: Sequence[int] = ()) -> float:
        """The same with its backward pass: twice as much again, where weights are frozen once.

        What gradient checkpointing computes anew is not needed, so not in it.
        """
        tokens, square = _distinct(lengths, again)
        trunk = (3 * self.trained + 2 * self.frozen) * tokens
        head = (3 if self.head_trained else 2) * self.head * responses
        return 2.0 * (trunk + head) + 3 * self.attention * square

    def decoding(self, prompts: Sequence[int], responses: Sequence[int]) -> float:
        """Every token after a response's first, one at a time, on a cache of what came before."""
        steps = sum(n - 1 for n in responses)
        return 2.0 * (self.matrices + self.head) * steps + 2 * self.attention * _read(prompts, responses)

    def decoded_bytes(self, prompts: Sequence[int], responses: Sequence[int], size: int) -> float:
        """Moved by the same, in one batch: weights once a step, keys and values of the texts so far.

        size: bytes of a number as it is computed in; weights that are stored in fewer move as they are.
        """
        weights = sum(count * min(stored, size) for count, stored in self.layers)
        return float(weights * (max(responses) - 1) + _read(prompts, responses) * self.key_values * size)


def head_width(config: PretrainedConfig) -> int:
    """Numbers a head of attention."""
    heads = getattr(config, "num_attention_heads", 0) or 1
    return getattr(config, "head_dim", None) or config.hidden_size // heads


def key_values(config: PretrainedConfig) -> int:
    """Numbers that a cache keeps of one token."""
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    return 2 * config.num_hidden_layers * heads * head_width(config)


def _distinct(lengths: Sequence[int], again: Sequence[int]) -> tuple[int, int]:
    """Tokens, and squared tokens a text, each beginning counted once."""
    tokens, squares = (sum(n**power for n in lengths) - sum(n**power for n in again) for power in (1, 2))
    return tokens, squares


def _read(prompts: Sequence[int], responses: Sequence[int]) -> int:
    """Tokens whose keys and values are looked at: after a prompt of p, the i-th token fed, from 1, sees p + i."""
    return sum((n - 1) * p + (n - 1) * n // 2 for p, n in zip(prompts, responses, strict=True))


def _linear_layers(trunk: nn.Module) -> Iterator[Any]:
    off = set()
    for module in trunk.modules():
        if isinstance(module, LoraLayer):
            on = [] if module.disable_adapters or module.merged else module.active_adapters
            for part in (module.lora_A, module.lora_B):
                off |= {id(layer) for name, layer in part.items() if name not in on}
    for module in trunk.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in off:
            yield module


def _elements(layer: Any) -> int:
    """By the layer's widths: packed in 4 bits or spread by ZeRO-3, its weight has another shape."""
    return layer.nx * layer.nf if isinstance(layer, Conv1D) else layer.in_features * layer.out_features
