"""What the settings share: help texts, and the hardware's defaults."""

from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments


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
