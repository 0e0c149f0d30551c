"""DeepSpeed's settings: `auto` and blocks of a config file, filled in from the arguments as transformers does.

What the file says otherwise is a UserError, since DeepSpeed would train by it and the arguments would be ignored.
"""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedConfig, TrainingArguments
from transformers.training_args import OptimizerNames

from rlhf.errors import UserError

# The schedules of transformers that stand for DeepSpeed's.
_SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear"}

# Of these optimizers DeepSpeed's are, by default, AdamW.
_ADAM = ("adam", "adamw")
_ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)


def configure_deepspeed(plugin: Any, args: TrainingArguments, counted: int) -> None:
    """Set what the launcher's config leaves to the training arguments, but for sizes of the model.

    plugin: Accelerate's DeepSpeedPlugin. counted: accumulation steps that the engine counts; 1 for a learner that does
    it itself. Optimizer and schedule are always those of the arguments: blocks that say the same are taken out.
    """
    config = plugin.deepspeed_config
    micro, parts, ranks = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    clipping = max(args.max_grad_norm, 0.0)
    _check(config, "train_micro_batch_size_per_gpu", {"per_device_train_batch_size": micro})
    # 1 is what Accelerate writes where nothing is set.
    _check(config, "gradient_accumulation_steps", {"gradient_accumulation_steps": parts, "": 1})
    of_all = {"per_device_train_batch_size x gradient_accumulation_steps x processes": micro * parts * ranks}
    _check(config, "train_batch_size", of_all | {"": micro * ranks})
    _check(config, "gradient_clipping", {"max_grad_norm": clipping})
    config |= {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": counted,
        "train_batch_size": micro * counted * ranks,
        "gradient_clipping": clipping,
    }
    _take_optimizer(config.pop("optimizer", None), args)
    _take_schedule(config.pop("scheduler", None), args)


def fill_sizes(accelerator: Accelerator, model: PreTrainedConfig) -> None:
    """Fill in what is `auto` and depends on the size of the model; a UserError for any other `auto` that is left."""
    hidden = getattr(model.get_text_config(), "hidden_size", 0)
    sizes = {
        "zero_optimization.reduce_bucket_size": hidden * hidden,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden,
        "zero_optimization.stage3_gather_16bit_weights_on_model_save": False,
    }
    plugin = accelerator.state.deepspeed_plugin
    try:
        plugin.deepspeed_config_process(must_match=False, **(sizes if hidden else {}))
    except ValueError as error:  # an `auto` that nothing is known for
        name = str(error).split("`")[1]
        raise UserError(f"DeepSpeed's config: expected a value for {name}, found auto") from error


def _check(config: Mapping[str, Any], name: str, fits: Mapping[str, Any], block: str = "") -> None:
    """A UserError for a value that is none of `fits`: the argument's name -> its value."""
    found = config.get(name, "auto")
    if found not in ("auto", None, *fits.values()):
        argument, value = next(iter(fits.items()))
        raise UserError(
            f"DeepSpeed's config: {block}{name} is {found!r}, but {argument} of the settings is {value}; "
            "set it to auto, or both alike"
        )


def _take_optimizer(block: Any, args: TrainingArguments) -> None:
    if block is None:
        return
    kind, params = str(block.get("type")), dict(block.get("params") or {})
    if kind.lower() not in _ADAM or OptimizerNames(args.optim) not in _ADAMW:
        fits = " or ".join(name.value for name in _ADAMW)
        raise UserError(
            f"DeepSpeed's config: expected an optimizer block of AdamW with optim {fits}, found {kind} with optim "
            f"{OptimizerNames(args.optim).value}; leave the block out and set optim"
        )
    known: dict[str, dict[str, Any]] = {
        "lr": {"learning_rate": args.learning_rate},
        "betas": {"adam_beta1 and adam_beta2": [args.adam_beta1, args.adam_beta2]},
        "eps": {"adam_epsilon": args.adam_epsilon},
        "weight_decay": {"weight_decay": args.weight_decay},
        "adam_w_mode": {"AdamW": True},
        "torch_adam": {"either": True, "": False},
        "bias_correction": {"AdamW": True},
    }
    _check_block("optimizer.params", params, known)


def _take_schedule(block: Any, args: TrainingArguments) -> None:
    """Set lr_scheduler_type to the block's, unless it has been set to another one."""
    if block is None:
        return
    kind, params = str(block.get("type")), dict(block.get("params") or {})
    default, found = "linear", str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    schedule = _SCHEDULES.get(kind)
    if schedule is None or found not in (default, schedule):
        raise UserError(
            f"DeepSpeed's config: expected a scheduler block of {' or '.join(_SCHEDULES)} and an lr_scheduler_type "
            f"that agrees, found {kind} with lr_scheduler_type {found}; leave the block out and set lr_scheduler_type"
        )
    known: dict[str, dict[str, Any]] = {
        "warmup_min_lr": {"the schedule's start": 0},
        "warmup_max_lr": {"learning_rate": args.learning_rate},
        "warmup_num_steps": {"warmup_steps": args.warmup_steps, "": max(1, args.warmup_steps)},
        "warmup_type": {"the schedule": "linear"},
        "total_num_steps": {"max_steps": args.max_steps},
    }
    _check_block("scheduler.params", params, known)
    args.lr_scheduler_type = schedule


def _check_block(where: str, params: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> None:
    for name in params:
        if name not in known:
            raise UserError(f"DeepSpeed's config: expected no {where}.{name}; set it in the training arguments")
        _check(params, name, known[name], f"{where}.")
