"""Weights that an engine has spread over the processes."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from rlhf.distributed.collectives import unsharded
from rlhf.distributed.launch import (
    _PRECISION,
    is_deepspeed,
    is_fsdp,
)
from rlhf.errors import UserError


def cast_weights(accelerator: Accelerator, models: Iterable[torch.nn.Module]) -> None:
    """Under DeepSpeed and FSDP2, weights to the precision in which it trains, of models, too, that it does not cast.

    FSDP2 casts those that it trains as it gathers them; they stay as they are here.

    Models that are never trained would compute in float32, since Accelerate's autocast does nothing there, and a policy
    would differ from its own reference. Models that ZeRO-3 has spread as they were loaded are in that precision, but
    adapters on them are not, and DeepSpeed wants one for all. As in DeepSpeed itself buffers stay.
    """
    dtype = _PRECISION.get(accelerator.mixed_precision)
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

    It leaves steps out itself whose norm is not finite, on all ranks. A UserError where it did not: under bf16 it
    may be told not to look.
    """
    norm = float(engine.get_global_grad_norm() or 0.0)
    done = bool(engine.was_step_applied())
    if done and not math.isfinite(norm):
        raise UserError(
            f"DeepSpeed: expected steps left out whose gradient is not finite, found one taken in step {step}; "
            "see check_grad_overflow in its config; what was saved before is whole"
        )
    return norm, done


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether ZeRO-3 has spread the model's weights over the processes."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def numel(parameter: torch.nn.Parameter) -> int:
    """Elements of the whole parameter, of which ZeRO-3 may have left none here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextmanager
def gathered(modules: Iterable[torch.nn.Module], changed: bool = False) -> Iterator[None]:
    """Weights that ZeRO-3 or FSDP2 has spread are whole on every rank inside the block, gathered once.

    changed: under ZeRO-3, what rank 0 writes to them inside is kept, on all ranks. FSDP2 shards no model before it is
    trained; see `unsharded`, which takes whole models.
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
