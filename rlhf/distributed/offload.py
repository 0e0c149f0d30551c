"""Optimizer states in main memory (ZeRO-Offload): the optimizers that support it, and compiling them."""

import os
from pathlib import Path
from typing import Any

from torch.optim import Adagrad, Adam, AdamW, Optimizer
from transformers.training_args import OptimizerNames

from rlhf.console import screen
from rlhf.distributed.collectives import main_process_first, on_all
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

    The first process of each machine compiles; the others find the result in the cache.
    """
    if not replaces_optimizer(plugin):
        return
    kind = OptimizerNames(optim)
    if kind not in _NAMES:
        known = ", ".join(name.value for name in _NAMES)
        raise UserError(f"optim: expected one of {known} with offloaded optimizer states, found {kind.value}")
    with main_process_first():
        failure = _try_to_compile(kind)
    on_all(lambda: _raise(failure))


def check_given_optimizer(plugin: Any, optimizer: Optimizer) -> None:
    """A UserError for a user's optimizer that DeepSpeed would silently replace by Adam under offload."""
    if replaces_optimizer(plugin) and not isinstance(optimizer, _KINDS):
        raise UserError(
            f"optimizers: expected Adam, AdamW or Adagrad of torch.optim with offloaded optimizer states, "
            f"found {type(optimizer).__name__}"
        )


def compile_cpu_optimizer() -> None:
    """Compile DeepSpeed's Adam for the CPU, or load it from its cache. A UserError if that fails.

    Needs a C++ compiler and ninja, no nvcc. The cache is TORCH_EXTENSIONS_DIR (default ~/.cache/torch_extensions) and
    is valid only for the kind of CPU that compiled it.
    """
    warn_of_locks()
    _raise(_try_to_compile(OptimizerNames.ADAMW_TORCH))


def warn_of_locks() -> None:
    """Name the builds of DeepSpeed's operators that have begun: the next one waits, also for one that was killed."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        screen.warn(
            f"{lock}: {lock.parent.name} is being built for DeepSpeed; who needs it waits until this file is gone; "
            "delete it if no build is running, since one was killed"
        )


def _try_to_compile(kind: OptimizerNames) -> Exception | None:
    from deepspeed.ops import op_builder  # importing it takes seconds

    builder = op_builder.CPUAdagradBuilder if kind == OptimizerNames.ADAGRAD else op_builder.CPUAdamBuilder
    try:
        builder().load()
    except Exception as error:  # from compiler, linker or loader
        return error
    return None


def _raise(error: Exception | None) -> None:
    if error is not None:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            "offload: DeepSpeed's Adam for the CPU did not compile; install a C++ compiler and ninja "
            f"(rlhf prepare --engine zero3_offload compiles it in advance): {reason.strip()[:200]}"
        ) from error
