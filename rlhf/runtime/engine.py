"""What accelerate was asked to be, what it became, and weights that an engine has spread over the processes."""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from rlhf.errors import UserError


def wants_deepspeed() -> bool:
    """Whether `accelerate launch` was given a DeepSpeed config."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether the engine is DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def is_fsdp(accelerator: Accelerator) -> bool:
    """Whether the engine is FSDP."""
    return accelerator.distributed_type == DistributedType.FSDP


def engine_name(accelerator: Accelerator) -> str:
    """What became of it, as run.json has it: NO, MULTI_GPU, DEEPSPEED ZeRO-3, ..."""
    name = str(accelerator.distributed_type.value)
    return f"{name} ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}" if is_deepspeed(accelerator) else name


def check_engine(accelerator: Accelerator) -> None:
    """A UserError where the engine or the number of processes is not what was asked for.

    Several pairs of config and environment silently train one model a process, or plain data parallel instead of
    ZeRO or FSDP.
    """
    world = int(os.environ.get("WORLD_SIZE") or 1)
    found = accelerator.distributed_type
    if accelerator.num_processes != world:
        raise UserError(f"processes: expected {world} that know of one another, found {accelerator.num_processes}")
    if wants_deepspeed() and found != DistributedType.DEEPSPEED:
        raise UserError(f"engine: expected DeepSpeed, found {found.value}; ACCELERATE_USE_CPU turns it off")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and found != DistributedType.FSDP:
        raise UserError(f"engine: expected FSDP, found {found.value}; on CPUs accelerate does not apply it: use zero3")


def check_wrapped(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """A UserError where several processes hold models that do not share their gradients."""
    if accelerator.num_processes > 1 and accelerator.unwrap_model(model) is model:
        raise UserError(f"engine: expected a model that is trained together, found {type(model).__name__} on each rank")


def configure_deepspeed(accelerator: Accelerator, micro_batch: int, max_grad_norm: float) -> None:
    """What the launcher's config leaves to the training arguments. Accumulation is counted by the learner."""
    plugin = accelerator.state.deepspeed_plugin
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = micro_batch
    plugin.deepspeed_config["gradient_accumulation_steps"] = 1
    plugin.deepspeed_config["gradient_clipping"] = max(max_grad_norm, 0.0)


def cast_weights(accelerator: Accelerator, models: Iterable[torch.nn.Module]) -> None:
    """Under DeepSpeed, weights to the precision in which it trains: of those models, too, that it does not cast.

    Models that are never trained would compute in float32, since Accelerate's autocast does nothing there, and a policy
    would differ from its own reference. Models that ZeRO-3 has spread as they were loaded are in that precision, but
    adapters on them are not, and DeepSpeed wants one for all. As in DeepSpeed itself buffers stay.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if dtype is None or not is_deepspeed(accelerator):
        return
    for model in models:
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
    """Weights that ZeRO-3 has spread are whole on every rank inside the block: one collective for all of them.

    changed: what rank 0 writes to them inside is kept, on all ranks.
    """
    own = {id(p): p for module in modules for p in module.parameters() if hasattr(p, "ds_id")}
    if not own:
        yield
        return
    from deepspeed import zero  # importing it takes seconds

    with zero.GatheredParameters(list(own.values()), modifier_rank=0 if changed else None):
        yield
