"""Linear layers on a CPU whose weights are laid out beforehand as oneDNN's kernels read them.

PyTorch lays a weight out at each call, or, in float32, leaves it to MKL, which is slow for few rows. Measured on 2
cores with layers 256 to 1,536 wide: a product of 1 to 16 rows takes a half to a quarter of the time, one of thousands
80 to 95 %. The two operators are those of PyTorch's own compiler, the same since 2.0, but with an underscore: in a
PyTorch without them layers stay as they are.
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from rlhf.distributed.sharding import numel

_FEWEST = 2**14  # elements of a weight; below, a call costs more than it saves

_DTYPES = (torch.float32, torch.bfloat16)


def available() -> bool:
    """Whether this PyTorch has the operators, on the kind of CPU that they were tried on."""
    ops, x86 = torch.ops.mkldnn, platform.machine() in ("x86_64", "AMD64")
    return x86 and hasattr(ops, "_linear_pointwise") and hasattr(ops, "_reorder_linear_weight")


def layout_bytes(model: nn.Module, size: int, frozen: bool = False) -> float:
    """Of one layout of all a model's linear layers, or of the frozen ones, with numbers of `size` bytes."""
    layers: Any = [layer for layer in model.modules() if type(layer) in (nn.Linear, Conv1D)]
    weights = {id(layer.weight): numel(layer.weight) for layer in layers if not (frozen and layer.weight.requires_grad)}
    return float(size * sum(n for n in weights.values() if n >= _FEWEST))


class Prepacked:
    """Layouts of weights that are never trained, made once and kept: they take their memory a second time, and a
    third time where there are gradients to pass on."""

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}

    @contextmanager
    def active(self, *models: nn.Module) -> Iterator[None]:
        """Inside, the frozen linear layers of models on a CPU compute by their layouts."""
        with ExitStack() as stack:
            for layer in _layers(models):
                if not any(parameter.requires_grad for parameter in layer.parameters()):
                    if id(layer) not in self._layers:
                        self._layers[id(layer)] = _Layer(layer)
                    self._layers[id(layer)].look()
                    stack.enter_context(_installed(layer, self._layers[id(layer)]))
            yield


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Inside, all linear layers of a model on a CPU compute by layouts, without gradients; they are made anew.

    In float32 those of a layer with an adapter are of their sum. In 16 bits that would round small changes away.
    """
    with ExitStack() as stack:
        for layer in _adapted(model):
            stack.enter_context(_installed(layer, _Layer(layer.get_base_layer(), _whole(layer), layer.forward)))
        for layer in _layers([model]):
            stack.enter_context(_installed(layer, _Layer(layer)))
        yield


class _Layer:
    """One layer's weight in the layouts asked for so far."""

    def __init__(self, layer: Any, weight: Tensor | None = None, plain: Callable[..., Tensor] | None = None) -> None:
        """weight, plain: where they are not the layer's own; for what is not for layouts, plain is called."""
        self.layer, self.given, self.plain = layer, weight, plain or layer.forward
        self.made: dict[tuple[torch.dtype, bool], Tensor] = {}  # by precision, and whether for the way back
        self.state = (0, 0)  # of the weight that they were made from
        self.look()

    def look(self) -> None:
        """Forget layouts of a weight that is no longer what it was, as after loading."""
        self.weight, self.bias = self.layer.weight if self.given is None else self.given, self.layer.bias
        # Weights that inference_mode made count no versions, and do not change outside it.
        state = self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version
        if state != self.state:
            self.state, self.made = state, {}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """float [..., in] -> [..., out], as the layer itself."""
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else self.weight.dtype
        if args or kwargs or dtype not in _DTYPES or not (autocast or x.dtype == dtype):
            return self.plain(x, *args, **kwargs)
        x, bias = x.to(dtype), self.bias
        bias = None if bias is None else bias.to(dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            found: Tensor = _Linear.apply(x, bias, self)
            return found
        return _product(x, self.of(dtype), bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        """What a copy of the layer computes by: it may be changed, so not by layouts."""
        plain: Any = self.plain
        owner = plain.__self__
        return MethodType(type(owner).forward, memo[id(owner)])

    def of(self, dtype: torch.dtype, back: bool = False) -> Tensor:
        """The layout for a product with the weight, or back: with its transpose."""
        if (dtype, back) not in self.made:
            weight = self.weight.detach()
            out_first = weight.t() if isinstance(self.layer, Conv1D) else weight
            rows = (out_first.t() if back else out_first).to(dtype)
            self.made[dtype, back] = torch.ops.mkldnn._reorder_linear_weight(rows)
        return self.made[dtype, back]


class _Linear(torch.autograd.Function):
    """Through a frozen layer: a gradient for what went in, and none for weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:
        ctx.layer = layer
        return _product(x, layer.of(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _product(grads[0], ctx.layer.of(grads[0].dtype, back=True), None), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _layers(models: Any) -> Iterator[Any]:
    """Linear layers whose forward pass is their class's own, each once."""
    seen = set[int]()
    for layer in (layer for model in models for layer in model.modules()):
        plain = type(layer) in (nn.Linear, Conv1D) and "forward" not in vars(layer)
        if plain and id(layer) not in seen and _fits(layer.weight):
            seen.add(id(layer))
            yield layer


def _adapted(model: nn.Module) -> Iterator[Any]:
    """Layers under one plain adapter that is on, where float32 is computed in."""
    for layer in [] if torch.is_autocast_enabled("cpu") else model.modules():
        if type(layer) is LoraLinear and len(layer.active_adapters) == 1 and "forward" not in vars(layer):
            base: Any = layer.get_base_layer()
            name = layer.active_adapters[0]
            on = name in layer.lora_A and not (layer.disable_adapters or layer.merged or layer.training)
            plain = on and not layer.lora_variant and getattr(layer.lora_B[name], "bias", None) is None
            if plain and type(base) in (nn.Linear, Conv1D) and _fits(base.weight, torch.float32):
                yield layer


def _whole(layer: Any) -> Tensor:
    weight: Tensor = layer.get_base_layer().weight.detach() + layer.get_delta_weight(layer.active_adapters[0])
    return weight


def _fits(weight: Tensor, *dtypes: torch.dtype) -> bool:
    whole = type(weight) in (Tensor, nn.Parameter) and not hasattr(weight, "ds_id")  # sharded by no engine
    there = whole and weight.device.type == "cpu" and weight.layout == torch.strided
    return there and weight.dtype in (dtypes or _DTYPES) and weight.numel() >= _FEWEST and available()


@contextmanager
def _installed(layer: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
