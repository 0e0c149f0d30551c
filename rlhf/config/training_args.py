"""What `PPOTrainer` does with each field of `TrainingArguments`.

`PPOConfig` refuses fields that it would ignore. A test checks all fields of the installed transformers.
"""

from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments

from rlhf.errors import UserError

HONOURED = frozenset(
    [
        "output_dir",
        "per_device_train_batch_size",
        "num_train_epochs",
        "max_steps",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim",
        "optim_args",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "bf16",
        "fp16",
        "tf32",
        "use_cpu",
        "full_determinism",
        "seed",
        "data_seed",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "torch_empty_cache_steps",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "per_device_eval_batch_size",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "resume_from_checkpoint",
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_revision",
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "ddp_backend",
        "ddp_timeout",
    ]
)

# Any value is accepted; none has an effect here.
INERT = {
    "do_train": "for users' own scripts",
    "do_eval": "for users' own scripts",
    "do_predict": "for users' own scripts",
    "local_rank": "set by the launcher",
}

_NO_LOADER = "there is no data loader: prompts are in memory"

_LAUNCHER = "set it in an accelerate config (accelerate_configs/) and start with accelerate launch"

_NO_LOGITS = "evaluation samples responses and scores them; no logits or labels are gathered"

_NOT_PPO = "PPO's losses have no use for it"

REFUSED = {
    "remove_unused_columns": "every column stays, for reward functions",
    "logging_nan_inf_filter": "numbers are written as they are",
    "save_on_each_node": "checkpoints go to one folder that all nodes share",
    "prediction_loss_only": "evaluation samples; it has no loss",
    "average_tokens_across_devices": "losses are always divided by the token count of all ranks",
    "label_smoothing_factor": _NOT_PPO,
    "optim_target_modules": "GaLore and similar optimizers are not supported; use LoRA",
    "neftune_noise_alpha": "noise on the embeddings would change the probability ratio",
    "bf16_full_eval": "bf16 covers evaluation",
    "fp16_full_eval": "fp16 covers evaluation",
    "torch_compile": "not supported",
    "torch_compile_backend": "not supported",
    "torch_compile_mode": "not supported",
    "use_liger_kernel": "not supported",
    "liger_kernel_config": "not supported",
    "use_cache": "generation always uses a cache, training never does",
    "auto_find_batch_size": "set per_device_train_batch_size; results do not depend on it",
    "include_num_input_tokens_seen": "see episode in the metrics",
    "trackio_space_id": "not supported",
    "trackio_bucket_id": "not supported",
    "trackio_static_space_id": "not supported",
    "eval_do_concat_batches": _NO_LOGITS,
    "eval_use_gather_object": _NO_LOGITS,
    "eval_accumulation_steps": _NO_LOGITS,
    "include_for_metrics": _NO_LOGITS,
    "batch_eval_metrics": _NO_LOGITS,
    "label_names": _NO_LOGITS,
    "save_only_model": "a checkpoint holds everything needed to resume; save_model() writes the policy alone",
    "enable_jit_checkpoint": "not supported",
    "hub_always_push": "not supported",
    "ignore_data_skip": "a resumed run always continues where it stopped",
    "restore_callback_states_from_checkpoint": "not supported",
    "accelerator_config": _LAUNCHER,
    "parallelism_config": _LAUNCHER,
    "fsdp": _LAUNCHER,
    "fsdp_config": _LAUNCHER,
    "deepspeed": _LAUNCHER,
    "dataloader_drop_last": "a last partial batch is trained on",
    "dataloader_num_workers": _NO_LOADER,
    "dataloader_pin_memory": _NO_LOADER,
    "dataloader_persistent_workers": _NO_LOADER,
    "dataloader_prefetch_factor": _NO_LOADER,
    "dataloader_multiprocessing_context": _NO_LOADER,
    "dataloader_in_order": _NO_LOADER,
    "train_sampling_strategy": "each epoch has its own random order",
    "length_column_name": _NO_LOADER,
    "debug": "not supported",
    "skip_memory_metrics": "not supported",
}


def _is_off(value: Any) -> bool:
    return not value or value == "no"  # an empty list or text counts as off


def refuse_ignored(args: TrainingArguments) -> None:
    """A UserError for the first field that is set but would be ignored. Call it before fields are rewritten."""
    known = {field.name for field in fields(TrainingArguments)} - HONOURED - set(INERT)
    for field in fields(args):  # its defaults may differ from those of TrainingArguments
        if field.name not in known:
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        found = getattr(args, field.name)
        if found != default and not (_is_off(found) and _is_off(default)):
            reason = REFUSED.get(field.name, "PPOTrainer does not support it")
            raise UserError(f"{field.name}: expected {default!r}, found {found!r}: {reason}")
