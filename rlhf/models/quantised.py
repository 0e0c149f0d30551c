"""bitsandbytes' 4-bit layers, made fit for training adapters on them and for checkpoints."""

import sys
from typing import Any

from torch import nn

from rlhf.errors import UserError


def prepare_4bit(name: str, model: nn.Module) -> None:
    """Keep the model's 4-bit layers in the layout that gradients pass through, and let them load what they save.

    On CPUs with avx512_bf16 the layers go over to a layout of bfloat16 without a backward pass, at the first pass
    in eval mode: adapters would then silently learn nothing. On other devices that switch changes nothing.
    name: the argument that an error is about. Models without such layers are left as they are.
    """
    if "bitsandbytes" not in sys.modules:  # then no model has its layers
        return
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            state = getattr(layer.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):  # not undone without loss
                raise UserError(f"{name}: expected a 4-bit model as loaded, found one that has run on the CPU")
            layer.register_load_state_dict_pre_hook(_load_scales)


def _load_scales(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    # The layers write their scales beside their codes, but do not read them.
    names = [name for name in state if name.startswith(f"{prefix}weight.")]
    if names:
        from bitsandbytes.functional import QuantState

        scales = {name: state.pop(name) for name in names}
        layer.weight.quant_state = layer.quant_state = QuantState.from_dict(scales, device=layer.weight.device)
