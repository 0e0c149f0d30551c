"""What accelerate was asked to be, what it became, and the two ways in which a step is taken."""

import os

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
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if found != DistributedType.FSDP:
            raise UserError(
                f"engine: expected FSDP, found {found.value}; on CPUs accelerate does not apply it: use zero2"
            )
        raise UserError("engine: expected data parallel or ZeRO-2, found FSDP, which PPO does not support yet")
    if is_deepspeed(accelerator) and accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise UserError("engine: expected data parallel or ZeRO-2, found ZeRO-3, which PPO does not support yet")


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
