"""Weights in a checkpoint as one process would write them."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_model

from rlhf.distributed.launch import is_deepspeed, is_fsdp
from rlhf.distributed.trained_weights import check_loaded

_WEIGHTS = "model.safetensors"


def register_unwrapped_weights(accelerator: Accelerator) -> None:
    """Have the accelerator write weights by the names they have without a wrapper for several processes."""
    if is_deepspeed(accelerator) or is_fsdp(accelerator):
        return

    def unwrapped(models: list[Any], weights: list[dict[str, Any]], folder: str) -> None:
        prefixes = ["" if accelerator.unwrap_model(model) is model else "module." for model in models]
        # Of an OrderedDict, and of nothing else, accelerate writes a tensor with two names (tied embeddings) once.
        weights[:] = [
            OrderedDict((name.removeprefix(prefix), tensor) for name, tensor in state.items())
            for prefix, state in zip(prefixes, weights, strict=True)
        ]

    def wrapped(models: list[Any], folder: str) -> None:
        model = accelerator.unwrap_model(models.pop())
        check_loaded(model, *load_model(model, Path(folder) / _WEIGHTS, strict=False))

    accelerator.register_save_state_pre_hook(unwrapped)
    accelerator.register_load_state_pre_hook(wrapped)
