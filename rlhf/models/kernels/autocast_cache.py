"""Frozen weights under autocast: cast once, not at each call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf.distributed.sharding import is_sharded


@contextmanager
def frozen_cast(*models: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, the float32 weights of frozen layers are replaced by copies in the precision that autocast computes in.

    dtype: that precision; None for that of the autocast that is on, or for nothing to do if none is. Autocast caches
    its casts of trained weights only: without this, the base under an adapter is cast again at each call, for each
    sampled token. The numbers are the same. Layers whose weights an adapter reads itself (DoRA's norms) are left alone.
    Costs half the weights' memory.
    """
    kind = next((p.device.type for model in models for p in model.parameters()), "cpu")
    if dtype is None and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if dtype is None or any(map(is_sharded, models)):
        yield
        return
    kept: dict[tuple[int, str], tuple[Any, str, nn.Parameter]] = {}
    modules = [module for model in models for module in model.modules()]
    read = {id(module.base_layer) for module in modules if getattr(module, "lora_variant", None)}
    for layer in modules:
        if type(layer) in (nn.Linear, Conv1D) and id(layer) not in read and "forward" not in vars(layer):
            kept |= {(id(layer), n): (layer, n, p) for n, p in layer.named_parameters(recurse=False) if _casts(p)}
    try:
        for layer, name, parameter in kept.values():
            setattr(layer, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
        yield
    finally:
        for layer, name, parameter in kept.values():
            setattr(layer, name, parameter)


def _casts(parameter: nn.Parameter) -> bool:
    return parameter.dtype == torch.float32 and not parameter.requires_grad
