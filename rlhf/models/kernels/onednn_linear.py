"""Linear layers on a CPU whose weights are laid out beforehand as oneDNN's kernels read them.

PyTorch lays a weight out at each call, or, in float32, leaves it to MKL, which is slow for few rows. Measured on 2
cores with layers 256 to 1,536 wide: a product of 1 to 16 rows takes a half to a quarter of the time, one of thousands
80 to 95 %. The two operators are those of PyTorch's own compiler, the same since 2.0, but with an underscore: in a
PyTorch without them layers stay as they are.

For the length of a block, a module of this file stands in the model in place of each such layer, with its parameters.
Outside, the model is what it was.
"""

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.distributed.sharding import numel

_FEWEST = 2**14  # elements of a weight; below, a call costs more than it saves


@cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """Precisions that this CPU has layouts in: bfloat16 needs AVX-512, or AVX with its conversions."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return (torch.float32, torch.bfloat16) if asked is None or asked() else (torch.float32,)


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this PyTorch has the operators, on the kind of CPU that they were tried on, in this precision."""
    ops, x86 = torch.ops.mkldnn, platform.machine() in ("x86_64", "AMD64")
    there = hasattr(ops, "_linear_pointwise") and hasattr(ops, "_reorder_linear_weight")
    return x86 and there and dtype in _dtypes()


def layout_bytes(model: nn.Module, size: int, frozen: bool = False) -> float:
    """Of one layout of all a model's linear layers, or of the frozen ones, with numbers of `size` bytes."""
    layers: Any = [layer for layer in model.modules() if type(layer) in (nn.Linear, Conv1D)]
    weights = {id(layer.weight): numel(layer.weight) for layer in layers if not (frozen and layer.weight.requires_grad)}
    return float(size * sum(n for n in weights.values() if n >= _FEWEST))


@contextmanager
def decoding_layouts(model: nn.Module) -> Iterator[None]:
    """Inside, all linear layers of a model on a CPU compute with layouts, without gradients; they are made for the
    block.

    In float32 a layer with an adapter is replaced by one of their sum. In 16 bits that would round small changes away.
    """
    with (
        _replaced([(*place, _sum(place[-1])) for place in _adapted_layers(model)]),
        _replaced([(*place, _in_place_of(place[-1])) for place in _linear_layers([model])]),
    ):
        yield


class _ByLayout(nn.Module):
    """A linear layer that lays its weight out when a layout is first needed, and keeps it.

    It has the parameters of the layer in whose place it stands, and its hooks. A copy of it is a copy of that layer.
    """

    layouts: dict[torch.dtype, Tensor]  # by precision

    def forward(self, input: Tensor) -> Tensor:
        """float [..., in] -> [..., out], as the layer itself."""
        weight: Any = self._parameters["weight"]
        bias: Tensor | None = self._parameters["bias"]
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else weight.dtype
        if dtype not in _dtypes() or not (autocast or input.dtype == dtype):
            plain: Tensor = super().forward(input)
            return plain
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.layout(dtype), bias, "none", [], "")
        return found

    def layout(self, dtype: torch.dtype) -> Tensor:
        """For a product with the weight."""
        if dtype not in self.layouts:
            weight: Any = self._parameters["weight"]
            rows = weight.detach().t() if isinstance(self, Conv1D) else weight.detach()
            self.layouts[dtype] = torch.ops.mkldnn._reorder_linear_weight(rows.to(dtype))
        return self.layouts[dtype]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as the layer itself: the weight of a copy may be trained, which no layout would follow."""
        state = {name: value for name, value in vars(self).items() if name != "layouts"}
        return object.__new__, (Conv1D if isinstance(self, Conv1D) else nn.Linear,), state


class OneDNNLinear(_ByLayout, nn.Linear):
    """In place of a linear layer."""


class OneDNNConv1D(_ByLayout, Conv1D):
    """In place of GPT-2's kind of linear layer, whose weight is [in, out]."""


def _in_place_of(layer: nn.Module) -> _ByLayout:
    """A module with the same dicts of parameters and hooks, so that what is set in one is set in both."""
    kind = OneDNNConv1D if isinstance(layer, Conv1D) else OneDNNLinear
    module = kind.__new__(kind)
    module.__dict__.update(vars(layer), layouts={})
    return module


def _sum(layer: Any) -> _ByLayout:
    """A layer with its adapter added in."""
    base = layer.get_base_layer()
    module = _in_place_of(base)
    weight = base.weight.detach() + layer.get_delta_weight(layer.active_adapters[0])
    module.__dict__["_parameters"] = {**base._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return module


@contextmanager
def _replaced(places: list[tuple[nn.Module, str, nn.Module, _ByLayout]]) -> Iterator[None]:
    """Inside, parents have a module in place of a layer; afterwards the layer again.

    places: parent, name of its attribute, layer and module.
    """
    try:
        for parent, name, _, module in places:
            setattr(parent, name, module)
        yield
    finally:
        for parent, name, layer, module in places:
            layer.training = module.training
            setattr(parent, name, layer)


def _children(models: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Any]]:
    """Parent, name and module of each module inside, but for those whose forward pass somebody has replaced."""
    seen = set[int]()
    for parent in (parent for model in models for parent in model.modules()) if available() else ():
        if id(parent) not in seen:
            seen.add(id(parent))
            for name, child in parent.named_children():
                if "forward" not in vars(child):
                    yield parent, name, child


def _linear_layers(models: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent, name, layer in _children(models):
        if type(layer) in (nn.Linear, Conv1D) and _fits(layer.weight):
            yield parent, name, layer


def _adapted_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Layers under one plain adapter that is on, where float32 is computed in."""
    for parent, attribute, layer in [] if torch.is_autocast_enabled("cpu") else _children([model]):
        if type(layer) is LoraLinear and len(layer.active_adapters) == 1:
            base: Any = layer.get_base_layer()
            name = layer.active_adapters[0]
            on = name in layer.lora_A and not (layer.disable_adapters or layer.merged or layer.training)
            linear = type(base) in (nn.Linear, Conv1D, OneDNNLinear, OneDNNConv1D)
            if on and not layer.lora_variant and linear and _fits(base.weight, torch.float32):
                yield parent, attribute, layer


def _fits(weight: Tensor, *dtypes: torch.dtype) -> bool:
    whole = type(weight) in (Tensor, nn.Parameter) and not hasattr(weight, "ds_id")  # sharded by no engine
    there = whole and weight.device.type == "cpu" and weight.layout == torch.strided
    return there and weight.dtype in (dtypes or _dtypes()) and weight.numel() >= _FEWEST
