"""The TRL model settings that each training script supports. It refuses those that it would ignore."""

from collections.abc import Set
from dataclasses import fields

from trl import ModelConfig

from rlhf.config.fields import at_least, check
from rlhf.errors import UserError, did_you_mean

LOADING = frozenset({"model_name_or_path", "model_revision", "dtype", "attn_implementation"})
ADAPTER = frozenset(
    {
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_target_parameters",
        "lora_modules_to_save",
        "use_rslora",
        "use_dora",
    }
)
QUANTISED = frozenset({"load_in_4bit", "load_in_8bit"})
STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")  # bitsandbytes'
IN_4BIT = frozenset({"bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant"})


def check_reward_model_config(config: ModelConfig) -> None:
    """A UserError for the first setting that train_reward.py would ignore or could not start with."""
    # The first is the default: the script sets what a reward model needs.
    _check_adapter(config, "train_reward.py", "a reward model", ("CAUSAL_LM", "SEQ_CLS"))


def check_ppo_model_config(config: ModelConfig) -> None:
    """A UserError for the first setting that train_ppo.py would ignore or could not start with."""
    _check_adapter(config, "train_ppo.py", "a policy", ("CAUSAL_LM",))


def _check_adapter(config: ModelConfig, script: str, role: str, tasks: tuple[str, ...]) -> None:
    known = LOADING | {"use_peft", "lora_task_type"}
    if config.lora_task_type not in tasks:
        expected = " or ".join(tasks)
        raise UserError(f"lora_task_type: expected {expected} for {role}, found {config.lora_task_type!r}")
    if not config.use_peft:
        _refuse(config, known, f"{script} uses it only with use_peft true")
    at_least(config, 1, "lora_r", "lora_alpha")
    check(config, lambda x: 0 <= x < 1, "a number from 0 to below 1", "lora_dropout")
    known |= ADAPTER | QUANTISED
    if not config.load_in_4bit:
        _refuse(config, known, f"{script} uses it only with load_in_4bit true")
    elif config.dtype == "auto":  # the dtype in which 4-bit layers compute
        raise UserError("dtype: expected float32, bfloat16 or float16 with load_in_4bit, found 'auto'")
    if config.bnb_4bit_quant_storage not in (None, *STORAGE):
        found = config.bnb_4bit_quant_storage
        meant = did_you_mean(found, STORAGE)
        raise UserError(f"bnb_4bit_quant_storage: expected one of {', '.join(STORAGE)}, found {found!r}{meant}")
    _refuse(config, known | IN_4BIT, f"{script} does not support it")


def _refuse(config: ModelConfig, honoured: Set[str], reason: str) -> None:
    for field in fields(config):
        found = getattr(config, field.name)
        if field.name not in honoured and found != field.default:
            raise UserError(f"{field.name}: expected {field.default!r}, found {found!r}: {reason}")
