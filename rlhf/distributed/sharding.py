"""Weights that an engine has sharded over the processes."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from rlhf.distributed.collectives import unsharded
from rlhf.distributed.launch import (
    autocast_dtype,
    is_deepspeed,
    is_fsdp,
)
from rlhf.errors import UserError


def cast_weights(accelerator: Accelerator, models: Iterable[torch.nn.Module]) -> None:
    """Under DeepSpeed and FSDP2: cast weights that the engine does not cast to the precision in which it trains.

    FSDP2 casts trained weights as it gathers them, so they stay as they are. Frozen models would otherwise compute in
    float32, because Accelerate's autocast does nothing there, and a policy would differ from its own reference. Weights
    that ZeRO-3 sharded while loading have that precision already, but adapters on them do not, and DeepSpeed requires
    one precision for all. Buffers stay, as in DeepSpeed itself.
    """
    dtype = autocast_dtype(accelerator)
    if dtype is None or not (is_deepspeed(accelerator) or is_fsdp(accelerator)):
        return
    for model in models:
        if is_fsdp(accelerator) and any(parameter.requires_grad for parameter in model.parameters()):
            continue
        for parameter in model.parameters():
            if parameter.dtype == torch.float32 and not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(dtype)


def step_taken(engine: Any, step: int) -> tuple[float, bool]:
    """DeepSpeed's gradient norm of its last step, and whether it took that step, which it does inside backward.

    DeepSpeed itself skips steps whose norm is not finite, on all ranks. A UserError if it took one: under bf16 that
    check can be turned off.
    """
    norm = float(engine.get_global_grad_norm() or 0.0)
    done = bool(engine.was_step_applied())
    if done and not math.isfinite(norm):
        raise UserError(
            f"DeepSpeed: it took step {step} although the gradient is not finite; set check_grad_overflow to true "
            "in its config; earlier checkpoints are intact"
        )
    return norm, done


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether ZeRO-3 has sharded the model's weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def numel(parameter: torch.nn.Parameter) -> int:
    """Number of elements of the full parameter, even if ZeRO-3 keeps none of them on this process."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextmanager
def gathered(modules: Iterable[torch.nn.Module], changed: bool = False) -> Iterator[None]:
    """Inside the block, weights that ZeRO-3 or FSDP2 has sharded are full tensors on every rank; gathered once.

    changed: under ZeRO-3, keep what rank 0 writes to them inside, on all ranks. FSDP2 shards no model before training
    starts. modules: under FSDP2 roots only, see `unsharded`.
    """
    modules = list(modules)
    own = {id(p): p for module in modules for p in module.parameters() if hasattr(p, "ds_id")}
    if not own:
        with unsharded(modules):
            yield
        return
    from deepspeed import zero  # importing it takes seconds

    with zero.GatheredParameters(list(own.values()), modifier_rank=0 if changed else None):
        yield
