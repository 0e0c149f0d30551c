"""Checkpoints whose weights have the same names for one process and for several."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_model

from rlhf.distributed.launch import is_deepspeed, is_fsdp
from rlhf.distributed.trained_weights import check_loaded

_WEIGHTS = "model.safetensors"


def register_unwrapped_weights(accelerator: Accelerator) -> None:
    """Make the accelerator save and load weights under their names without the data-parallel wrapper."""
    if is_deepspeed(accelerator) or is_fsdp(accelerator):
        return

    def unwrapped(models: list[Any], weights: list[dict[str, Any]], folder: str) -> None:
        prefixes = ["" if accelerator.unwrap_model(model) is model else "module." for model in models]
        # Accelerate writes a tensor with two names (tied embeddings) once only if it gets an OrderedDict.
        weights[:] = [
            OrderedDict((name.removeprefix(prefix), tensor) for name, tensor in state.items())
            for prefix, state in zip(prefixes, weights, strict=True)
        ]

    def wrapped(models: list[Any], folder: str) -> None:
        model = accelerator.unwrap_model(models.pop())
        check_loaded(model, *load_model(model, Path(folder) / _WEIGHTS, strict=False))

    accelerator.register_save_state_pre_hook(unwrapped)
    accelerator.register_load_state_pre_hook(wrapped)
