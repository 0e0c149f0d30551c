"""What the settings share: help texts, and the hardware's defaults."""

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


def bf16_is_fast() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware; elsewhere bf16 is many times slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def choose_hardware(args: TrainingArguments) -> None:
    """bf16 where the hardware has it, and CPU where there is no accelerator, unless said otherwise."""
    if not torch.accelerator.is_available():
        args.use_cpu = True
    if args.bf16 is None:
        args.bf16 = not args.fp16 and bf16_is_fast()
    if args.activation_checkpointing is None:  # the new name of gradient_checkpointing: TRL's is the old one
        args.activation_checkpointing = args.gradient_checkpointing


def check(settings: Any, holds: Callable[[Any], bool], expected: str, *names: str) -> None:
    """A UserError for the first of these fields that does not hold; one that is not set is not looked at."""
    for name in names:
        found = getattr(settings, name)
        if found is not None and not holds(found):
            raise UserError(f"{name}: expected {expected}, found {found}")


def at_least(settings: Any, least: int, *names: str) -> None:
    """A UserError for the first of these fields that is smaller, or not a number."""
    check(settings, lambda x: x >= least, f"at least {least}", *names)


def check_plain_name(field_name: str, name: str) -> None:
    """A UserError for a name that is not one folder's, directly under another."""
    plain = name.isprintable() and Path(name).name == name != ".." and len(name.encode(errors="replace"))
    plain = 0 if name.startswith("-") else plain  # it would be an option on a command line
    if not plain or plain > _LONGEST_NAME:
        raise UserError(f"{field_name}: expected a plain folder name, found {name[:_LONGEST_NAME]!r}")


def check_training(args: TrainingArguments) -> None:
    """A UserError for numbers of transformers' own settings with which training would fail, or do nothing."""
    at_least(args, 1, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    at_least(args, 1, "save_total_limit", "torch_empty_cache_steps")
    at_least(args, 0, "learning_rate", "weight_decay", "adam_epsilon", "warmup_steps", "eval_delay")
    check(args, lambda x: x > 0, "a positive number", "num_train_epochs", "eval_steps", "save_steps", "logging_steps")
    check(args, lambda x: 0 <= x < 1, "a number from 0 to below 1", "adam_beta1", "adam_beta2")
    check(args, lambda x: x == -1 or x >= 1, "at least 1, or -1 for none", "max_steps")
    check_seeds(args, "seed", "data_seed")


def check_seeds(settings: Any, *names: str) -> None:
    """A UserError for a seed that numpy does not take."""
    check(settings, lambda x: 0 <= x < 2**32, "a number from 0 to 4294967295", *names)
