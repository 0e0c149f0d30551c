"""What `PPOTrainer` does with each field of `TrainingArguments`, and the new names of older TRLs' fields.

`PPOConfig` refuses fields that it would ignore. A test checks all fields of the installed transformers.
"""

from collections.abc import Iterable, Mapping
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

_NO_BEST = "save checkpoints by save_steps and choose one by eval_metrics.jsonl"

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
    "load_best_model_at_end": _NO_BEST,
    "metric_for_best_model": _NO_BEST,
    "greater_is_better": _NO_BEST,
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

# Fields of older TRLs (PPO up to 0.11, PPOv2 after it) -> what to use now.
RENAMED = {
    "init_kl_coef": "kl_coef",
    "adap_kl_ctrl": "kl_target (set it for an adaptive coefficient, omit it for a fixed one)",
    "target": "kl_target (nats per token; it was nats per response)",
    "horizon": "kl_horizon",
    "kl_penalty": "kl_estimator (k1 or k3)",
    "ppo_epochs": "num_ppo_epochs",
    "early_stopping": "target_kl (set it to stop an update early)",
    "ratio_threshold": "target_kl",
    "steps": "total_episodes, or max_steps",
    "batch_size": "global_batch_size (over all processes; it was each one's own)",
    "mini_batch_size": "num_mini_batches (optimizer steps per pass; per_device_train_batch_size is the micro-batch)",
    "backward_batch_size": "per_device_train_batch_size",
    "forward_batch_size": "local_rollout_forward_batch_size",
    "log_with": "report_to",
    "exp_name": "run_name",
    "tracker_project_name": "project",
    "tracker_kwargs": "run_name, project and report_to",
    "project_kwargs": "output_dir",
    "accelerator_kwargs": "bf16, fp16, use_cpu and an accelerate config",
    "model_name": "the model argument of PPOTrainer",
    "query_dataset": "the train_dataset argument of PPOTrainer",
    "reward_model": "the reward_model argument of PPOTrainer",
    "is_peft_model": "the peft_config argument of PPOTrainer",
    "is_encoder_decoder": "nothing: only decoders are supported",
    "optimize_cuda_cache": "torch_empty_cache_steps",
    "optimize_device_cache": "torch_empty_cache_steps",
    "push_to_hub_if_best_kwargs": "push_to_hub and hub_model_id",
    "compare_steps": "push_to_hub and hub_strategy",
    "task_name": "run_name",
    "base_model": "sft_model_path",
    "noptepochs": "num_ppo_epochs",
    "nminibatches": "num_mini_batches",
    "num_updates": "max_steps, or total_episodes",
    "num_total_batches": "max_steps, or total_episodes",
    "sanity_check": "max_steps",
    "global_backward_batch_size": "per_device_train_batch_size x processes",
    "micro_batch_size": "per_device_train_batch_size x processes",
    "local_batch_size": "per_device_train_batch_size x gradient_accumulation_steps",
    "local_mini_batch_size": "num_mini_batches",
    "local_eval_batch_size": "per_device_eval_batch_size",
    "world_size": "nothing: it is the launcher's number of processes",
    "offload": "nothing: set offloading in an accelerate config with DeepSpeed",
    "non_eos_penalty": "missing_eos_penalty (what is subtracted from the score of a truncated response)",
    "penalty_reward_value": "missing_eos_penalty (a positive number, subtracted; it was the score itself)",
    "truncate_token": "stop_token",
    "truncate_token_id": "stop_token_id",
}


def refuse_renamed(
    names: Iterable[str], table: Mapping[str, str] = RENAMED, where: str = "PPOConfig", kind: str = "a field"
) -> None:
    """A UserError for the first of `names` that is an older TRL's, with its new name. table: old name -> new."""
    for name in names:
        if name in table:
            raise UserError(f"{where}: expected {kind} of TRL 1.12, found {name!r}: use {table[name]}")


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
