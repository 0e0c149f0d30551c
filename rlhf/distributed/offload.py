"""Optimizer states in main memory (ZeRO-Offload): which optimizers there are for them, and their code."""

from typing import Any

from torch.optim import Adagrad, Adam, AdamW, Optimizer
from transformers.training_args import OptimizerNames

from rlhf.distributed.collectives import main_process_first, on_all
from rlhf.errors import UserError

# Those that DeepSpeed has for the CPU. Any other would become Adam, and nothing would say so.
_NAMES = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED, OptimizerNames.ADAGRAD)

_KINDS = (Adam, AdamW, Adagrad)


def replaces_optimizer(plugin: Any) -> bool:
    """Whether DeepSpeed will put an optimizer of its own, for the CPU, in the place of what it is given.

    plugin: Accelerate's DeepSpeedPlugin, or None without DeepSpeed.
    """
    config = {} if plugin is None else plugin.deepspeed_config
    device = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    return device not in (None, "none") and bool(config.get("zero_force_ds_cpu_optimizer", True))


def prepare_offload(plugin: Any, optim: str) -> None:
    """Under offload: a UserError for an `optim` that would silently become Adam; compile the one that it becomes.

    The first process of each machine compiles, so that the others find it in the cache.
    """
    if not replaces_optimizer(plugin):
        return
    kind = OptimizerNames(optim)
    if kind not in _NAMES:
        known = ", ".join(name.value for name in _NAMES)
        raise UserError(f"optim: expected one of {known} where optimizer states are offloaded, found {kind.value}")
    with main_process_first():
        failure = _try_to_compile(kind)
    on_all(lambda: _raise(failure))


def check_given_optimizer(plugin: Any, optimizer: Optimizer) -> None:
    """A UserError for an optimizer of the user's own that would silently become Adam under offload."""
    if replaces_optimizer(plugin) and not isinstance(optimizer, _KINDS):
        raise UserError(
            f"optimizers: expected Adam, AdamW or Adagrad of torch.optim where optimizer states are offloaded, "
            f"found {type(optimizer).__name__}"
        )


def compile_cpu_optimizer() -> None:
    """Compile DeepSpeed's Adam for the CPU into its cache, or load it from there; a UserError where it cannot be.

    It needs a C++ compiler and ninja, no nvcc. The cache is TORCH_EXTENSIONS_DIR, ~/.cache/torch_extensions when not
    set; what is in it is for the kind of CPU that compiled it.
    """
    _raise(_try_to_compile(OptimizerNames.ADAMW_TORCH))


def _try_to_compile(kind: OptimizerNames) -> Exception | None:
    from deepspeed.ops import op_builder  # importing it takes seconds

    builder = op_builder.CPUAdagradBuilder if kind == OptimizerNames.ADAGRAD else op_builder.CPUAdamBuilder
    try:
        builder().load()
    except Exception as error:  # whatever compiler, linker and loader have to say
        return error
    return None


def _raise(error: Exception | None) -> None:
    if error is not None:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            "offload: expected DeepSpeed's Adam for the CPU to compile (a C++ compiler and ninja; scripts/prepare.py "
            f"--engine zero3_offload does it beforehand), found: {reason.strip()[:200]}"
        ) from error
