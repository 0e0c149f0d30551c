"""Fixes to bitsandbytes' 4-bit layers, for training adapters on them and for checkpoints."""

import sys
from typing import Any

from torch import nn

from rlhf.errors import UserError


def prepare_4bit(name: str, model: nn.Module) -> None:
    """Keep the model's 4-bit layers in a layout that has a backward pass, and make them load what they save.

    On CPUs with avx512_bf16, the first forward pass in eval mode would switch the layers to a bfloat16 layout without
    a backward pass, and adapters would silently learn nothing. name: the argument that an error names. Models without
    4-bit layers do not change.
    """
    if "bitsandbytes" not in sys.modules:  # then no model has its layers
        return
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            state = getattr(layer.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):  # cannot be undone without loss
                raise UserError(f"{name}: load the 4-bit model again: a forward pass on the CPU has changed its layout")
            layer.register_load_state_dict_pre_hook(_load_scales)


def _load_scales(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    # The layers save their scales beside the weights, but do not load them.
    names = [name for name in state if name.startswith(f"{prefix}weight.")]
    if names:
        from bitsandbytes.functional import QuantState

        scales = {name: state.pop(name) for name in names}
        layer.weight.quant_state = layer.quant_state = QuantState.from_dict(scales, device=layer.weight.device)
