"""What all settings share: help texts and checks."""

from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from rlhf.errors import UserError

_LONGEST_NAME = 200  # file systems take 255 bytes


def help_text(text: str, default: Any = None) -> Any:
    """A dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": text})


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
