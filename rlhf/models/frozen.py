"""Frozen weights under autocast."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf.runtime.engine import is_sharded


@contextmanager
def frozen_cast(model: nn.Module) -> Iterator[None]:
    """Inside, float32 weights of layers that are never trained are there in the precision that autocast computes in.

    Autocast keeps what it casts of trained weights only: the base under an adapter it casts anew at each call, for
    each token that is sampled. The numbers are the same, since it rounds all the same; layers whose weights an adapter
    reads by itself (DoRA's norms) are left alone. Costs half the weights' memory.
    """
    kind = next((p.device.type for p in model.parameters()), "cpu")
    if not torch.is_autocast_enabled(kind) or is_sharded(model):
        yield
        return
    dtype = torch.get_autocast_dtype(kind)
    kept: list[tuple[Any, str, nn.Parameter]] = []
    read = {id(module.base_layer) for module in model.modules() if getattr(module, "lora_variant", None)}
    for layer in model.modules():
        if type(layer) in (nn.Linear, Conv1D) and id(layer) not in read and "forward" not in vars(layer):
            kept += [(layer, name, p) for name, p in layer.named_parameters(recurse=False) if _casts(p)]
    try:
        for layer, name, parameter in kept:
            setattr(layer, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
        yield
    finally:
        for layer, name, parameter in kept:
            setattr(layer, name, parameter)


def _casts(parameter: nn.Parameter) -> bool:
    return parameter.dtype == torch.float32 and not parameter.requires_grad
