"""What `accelerate launch` was asked for, and checks that Accelerate does it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from rlhf.distributed.collectives import is_fsdp_module, precision_policy
from rlhf.distributed.devices import process_count
from rlhf.errors import UserError

# Settings of fsdp_config that are not fully supported, as `accelerate launch` puts them into the environment:
# variable -> (its value if not set, whether a value is supported, error line).
_FSDP_LIMITS: dict[str, tuple[str, Callable[[str], bool], str]] = {
    "FSDP_VERSION": ("1", lambda x: x == "2", "fsdp_version: expected 2"),
    "FSDP_OFFLOAD_PARAMS": (
        "false",
        lambda x: x == "false",
        "fsdp_offload_params: expected false (to offload, use zero3_offload)",
    ),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "false",
        lambda x: x == "false",
        "fsdp_cpu_ram_efficient_loading: expected false, because every process needs all frozen weights",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "false",
        lambda x: x == "false",
        "fsdp_activation_checkpointing: expected false (use gradient_checkpointing)",
    ),
    "FSDP_AUTO_WRAP_POLICY": (
        "no_wrap",
        lambda x: x != "size_based_wrap",
        "fsdp_auto_wrap_policy: expected TRANSFORMER_BASED_WRAP",
    ),
}

# Blocks of DeepSpeed's config file, each before those inside it.
_BLOCKS = (
    "bf16",
    "fp16",
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "optimizer",
    "optimizer.params",
    "scheduler",
    "scheduler.params",
)

_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """The precision that autocast computes in; None without mixed precision."""
    return _PRECISION.get(accelerator.mixed_precision)


def wants_deepspeed() -> bool:
    """Whether `accelerate launch` was given a DeepSpeed config."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def deepspeed_file() -> dict[str, Any]:
    """The DeepSpeed config file that `accelerate launch` was given; empty without one. A UserError if it is no JSON."""
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if not wants_deepspeed() or name == "none":
        return {}
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed_config_file {name[:200]}: expected JSON, found {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"deepspeed_config_file {name}: expected settings with values, found {type(found).__name__}")
    for block in _BLOCKS:
        inside: Any = found
        for part in block.split("."):
            inside = inside.get(part) or {}
        if not isinstance(inside, dict):
            raise UserError(
                f"deepspeed_config_file {name}: expected settings with values in {block}, found {inside!r:.40}"
            )
    return found


def launcher_precision() -> tuple[str, str] | None:
    """The precision that the launcher was asked for (no, bf16 or fp16), and by what; None if it leaves the choice.

    `accelerate launch` says no where nothing is set, too; started by this project (RLHF_LAUNCHER) it leaves the choice.
    """
    enabled = {name: (deepspeed_file().get(name) or {}).get("enabled") for name in ("bf16", "fp16")}
    named = {name: str(value).lower() == "true" for name, value in enabled.items() if value not in (None, "auto")}
    if named:
        return next((name for name, on in named.items() if on), "no"), "DeepSpeed's config file"
    word = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if word is None or (word == "no" and ("RLHF_LAUNCHER" in os.environ or deepspeed_file())):
        return None
    if word not in ("no", *_PRECISION):
        raise UserError(f"mixed_precision: expected no, bf16 or fp16 of accelerate launch, found {word}")
    return word, "accelerate launch"


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether the engine is DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def wants_fsdp() -> bool:
    """Whether `accelerate launch` was given an FSDP config."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_fsdp(accelerator: Accelerator) -> bool:
    """Whether the engine is FSDP2; `check_engine` refuses version 1."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_fsdp(*names: str) -> None:
    """A UserError if the launcher's FSDP config has an unsupported setting. names: variables to check; none for all."""
    for name in (names or _FSDP_LIMITS) if wants_fsdp() else ():
        default, will_do, line = _FSDP_LIMITS[name]
        found = os.environ.get(name, default).lower()
        if not will_do(found):
            raise UserError(f"{line}, found {found}; see accelerate_configs/fsdp2.yaml")


def engine_name(accelerator: Accelerator) -> str:
    """The engine in use, as in run.json: NO, MULTI_GPU, FSDP2, DEEPSPEED ZeRO-3, ..."""
    name = "FSDP2" if is_fsdp(accelerator) else str(accelerator.distributed_type.value)
    return f"{name} ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}" if is_deepspeed(accelerator) else name


def check_process_count(variable: str, wanted: int, found: int) -> None:
    """A UserError if the processes did not join: each would train alone. variable: where `wanted` is set."""
    if wanted != found:
        raise UserError(
            f"processes: {variable}={wanted}, but Accelerate started {found} process{'es' * (found > 1)}; "
            "start the script with accelerate launch"
        )


def check_engine(accelerator: Accelerator) -> None:
    """A UserError if the engine or the number of processes is not what the launcher was asked for.

    Several combinations of config and environment silently train one model per process, or use plain data parallelism
    instead of ZeRO or FSDP.
    """
    found = accelerator.distributed_type
    check_process_count("WORLD_SIZE", process_count(), accelerator.num_processes)
    if wants_deepspeed() and found != DistributedType.DEEPSPEED:
        raise UserError(
            f"engine: expected DeepSpeed, found {found.value}; unset ACCELERATE_USE_CPU, which turns it off"
        )
    if wants_fsdp() and found != DistributedType.FSDP:
        raise UserError(f"engine: expected FSDP, found {found.value}; on CPUs, where Accelerate has no FSDP, use zero3")
    check_fsdp()


def check_wrapped(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """A UserError if there are several processes whose models do not share gradients."""
    together = accelerator.unwrap_model(model) is not model or is_fsdp_module(model)
    if accelerator.num_processes > 1 and not together:
        raise UserError(
            f"engine: {type(model).__name__} would be trained on each rank alone; start with accelerate launch"
        )


def configure_fsdp(accelerator: Accelerator) -> None:
    """Let FSDP2 gather weights in the precision of the training arguments."""
    dtype = autocast_dtype(accelerator)
    if is_fsdp(accelerator) and dtype is not None:
        accelerator.state.fsdp_plugin.mixed_precision_policy = precision_policy(dtype)
