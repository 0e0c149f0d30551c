"""Gradient checkpointing in eval mode: a layer's activations are computed again in the backward pass, dropout off."""

import functools
import types
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.errors import UserError
from rlhf.models.unwrap import unwrap_peft


def recompute_activations(model: Any, options: Any) -> None:
    """Of each layer that transformers would checkpoint, which it does in training mode alone, where dropout is on.

    options: of `torch.utils.checkpoint.checkpoint`. A UserError for a model without such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        kind = type(unwrap_peft(model)).__name__
        raise UserError(f"gradient_checkpointing: set it to false: a {kind} has no layers that can be computed again")
    model.enable_input_require_grads()
    forward = functools.partial(_forward, {"use_reentrant": False} | (options or {}))
    for layer in layers:
        layer.forward = types.MethodType(forward, layer)  # bound, so that a copy of the model calls its own layers


def _forward(options: dict[str, Any], layer: nn.Module, *args: Any, **given: Any) -> Any:
    forward = functools.partial(type(layer).forward, layer, **given)
    return checkpoint(forward, *args, **options) if torch.is_grad_enabled() else forward(*args)
