"""What all settings share: help texts, checks, and defaults that depend on the hardware."""

import os
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from rlhf.errors import UserError

_LONGEST_NAME = 200  # file systems take 255 bytes


def help_text(text: str, default: Any = None) -> Any:
    """A dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": text})


def bf16_is_fast(use_cpu: bool = False) -> bool:
    """Whether the device multiplies bf16 matrices in hardware. If not, bf16 is many times slower than fp32.

    use_cpu: ask about the CPU even if there is an accelerator.
    """
    if not use_cpu and torch.accelerator.is_available():
        module = torch.get_device_module(torch.accelerator.current_accelerator())
        if hasattr(module, "is_bf16_supported"):  # CUDA, ROCm and XPU; older GPUs only emulate it
            return bool(module.is_bf16_supported(including_emulation=False))
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def process_count() -> int:
    """How many processes the launcher has started on all machines."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_process_count() -> int:
    """How many of them it has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def cpu_is_asked_for() -> bool:
    """Whether the launcher asks for the CPU, for example by use_cpu in its config."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "on", "y", "t")


def check_device_count(use_cpu: bool) -> None:
    """A UserError if more processes were started on this machine than it has devices."""
    processes = local_process_count()
    if use_cpu or not torch.accelerator.is_available():
        return
    devices = torch.accelerator.device_count()
    if processes > devices:
        raise UserError(
            f"processes: expected at most {devices} on this machine, one per visible device, found {processes}: "
            f"use accelerate launch --num_processes {devices}, or check CUDA_VISIBLE_DEVICES"
        )


def choose_hardware(args: TrainingArguments) -> None:
    """Set bf16 if the hardware has it and use_cpu if there is no accelerator, unless they are set already.

    A UserError if processes would have to share a device.
    """
    if not torch.accelerator.is_available() or cpu_is_asked_for():
        args.use_cpu = True
    check_device_count(args.use_cpu)
    if args.bf16 is None:
        args.bf16 = not args.fp16 and bf16_is_fast(args.use_cpu)
    if args.activation_checkpointing is None:  # the new name of gradient_checkpointing: TRL's is the old one
        args.activation_checkpointing = args.gradient_checkpointing


def check(settings: Any, holds: Callable[[Any], bool], expected: str, *names: str) -> None:
    """A UserError for the first of these fields whose value does not hold; None is always valid."""
    for name in names:
        found = getattr(settings, name)
        if found is not None and not holds(found):
            raise UserError(f"{name}: expected {expected}, found {found}")


def at_least(settings: Any, least: int, *names: str) -> None:
    """A UserError for the first of these fields that is smaller or nan."""
    check(settings, lambda x: x >= least, f"at least {least}", *names)


def check_plain_name(field_name: str, name: str) -> None:
    """A UserError for a name that cannot be that of one folder."""
    plain = name.isprintable() and Path(name).name == name != ".." and len(name.encode(errors="replace"))
    plain = 0 if name.startswith("-") else plain  # it would be an option on a command line
    if not plain or plain > _LONGEST_NAME:
        raise UserError(f"{field_name}: expected a plain folder name, found {name[:_LONGEST_NAME]!r}")


def check_training(args: TrainingArguments) -> None:
    """A UserError for values of transformers' settings with which training would fail or do nothing."""
    at_least(args, 1, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    at_least(args, 1, "save_total_limit", "torch_empty_cache_steps")
    at_least(args, 0, "learning_rate", "weight_decay", "adam_epsilon", "warmup_steps", "eval_delay")
    check(args, lambda x: x > 0, "a positive number", "num_train_epochs", "eval_steps", "save_steps", "logging_steps")
    check(args, lambda x: 0 <= x < 1, "a number from 0 to below 1", "adam_beta1", "adam_beta2")
    check(args, lambda x: x == -1 or x >= 1, "at least 1, or -1 for none", "max_steps")
    check_seeds(args, "seed", "data_seed")


def check_seeds(settings: Any, *names: str) -> None:
    """A UserError for a seed that numpy does not accept."""
    check(settings, lambda x: 0 <= x < 2**32, "a number from 0 to 4294967295", *names)
