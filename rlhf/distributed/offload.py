"""Optimizer states in main memory (ZeRO-Offload): the optimizers that support it, and compiling them."""

from typing import Any

from torch.optim import Adagrad, Adam, AdamW, Optimizer
from transformers.training_args import OptimizerNames

from rlhf.distributed.collectives import on_all
from rlhf.distributed.operators import build
from rlhf.errors import UserError

# DeepSpeed has these for the CPU. It would silently replace any other by Adam.
_NAMES = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED, OptimizerNames.ADAGRAD)

_KINDS = (Adam, AdamW, Adagrad)


def replaces_optimizer(plugin: Any) -> bool:
    """Whether DeepSpeed will replace the optimizer that it is given by its own for the CPU.

    plugin: Accelerate's DeepSpeedPlugin, or None without DeepSpeed.
    """
    config = {} if plugin is None else plugin.deepspeed_config
    device = ((config.get("zero_optimization") or {}).get("offload_optimizer") or {}).get("device", "none")
    return device not in (None, "none") and bool(config.get("zero_force_ds_cpu_optimizer", True))


def prepare_offload(plugin: Any, optim: str) -> None:
    """Under offload: compile the CPU optimizer. A UserError for an `optim` that DeepSpeed would replace by Adam.

    The first process compiles; the others find the result in the cache.
    """
    if not replaces_optimizer(plugin):
        return
    kind = OptimizerNames(optim)
    if kind not in _NAMES:
        known = ", ".join(name.value for name in _NAMES)
        raise UserError(f"optim: expected one of {known} with offloaded optimizer states, found {kind.value}")
    on_all(lambda: compile_cpu_optimizer(kind))


def check_given_optimizer(plugin: Any, optimizer: Optimizer) -> None:
    """A UserError for a user's optimizer that DeepSpeed would silently replace by Adam under offload."""
    if replaces_optimizer(plugin) and not isinstance(optimizer, _KINDS):
        raise UserError(
            f"optimizers: expected Adam, AdamW or Adagrad of torch.optim with offloaded optimizer states, "
            f"found {type(optimizer).__name__}"
        )


def compile_cpu_optimizer(kind: OptimizerNames = OptimizerNames.ADAMW_TORCH) -> None:
    """Compile DeepSpeed's optimizer of this kind for the CPU, or load it from its cache. A UserError if that fails."""
    from deepspeed.ops import op_builder  # importing it takes seconds

    builder = op_builder.CPUAdagradBuilder if kind == OptimizerNames.ADAGRAD else op_builder.CPUAdamBuilder
    hint = " (rlhf prepare --engine zero3_offload compiles it in advance)"
    build(builder(), "offload: DeepSpeed's Adam for the CPU", hint)
