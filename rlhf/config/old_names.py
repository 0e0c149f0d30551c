"""Old names of settings, of TRL and transformers, and what to use now: using one is a UserError that says it."""

from collections.abc import Iterable, Mapping

from rlhf.errors import UserError, did_you_mean

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

# Fields that transformers has removed from TrainingArguments, or TRL from ModelConfig -> what to use now.
REMOVED = {
    "warmup_ratio": "warmup_steps (below 1 it is a share of all steps)",
    "evaluation_strategy": "eval_strategy",
    "torch_dtype": "dtype",
    "logging_dir": "output_dir: logs go there",
    "overwrite_output_dir": "nothing: a run resumes only if resume_from_checkpoint says so",
    "no_cuda": "use_cpu",
    "use_mps_device": "nothing: an available device is used",
    "use_ipex": "nothing: it is not supported",
    "jit_mode_eval": "nothing: it is not supported",
    "torchdynamo": "nothing: it is not supported",
    "sharded_ddp": "nothing: set FSDP2 in an accelerate config",
    "fsdp_min_num_params": "nothing: set FSDP2 in an accelerate config",
    "fsdp_transformer_layer_cls_to_wrap": "nothing: set FSDP2 in an accelerate config",
    "xpu_backend": "ddp_backend",
    "half_precision_backend": "nothing: bf16 and fp16 are PyTorch's own",
    "fp16_backend": "nothing: fp16 is PyTorch's own",
    "fp16_opt_level": "nothing: fp16 is PyTorch's own",
    "tpu_num_cores": "nothing: it is not supported",
    "tpu_metrics_debug": "nothing: it is not supported",
    "mp_parameters": "nothing: it is not supported",
    "ray_scope": "nothing: it is not supported",
    "past_index": "nothing: it is not supported",
    "use_legacy_prediction_loop": "nothing: it is not supported",
    "adafactor": "optim: adafactor",
    "group_by_length": "train_sampling_strategy: group_by_length for a reward model; PPO needs nothing",
    "save_safetensors": "nothing: models are always safetensors",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_device_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "include_tokens_per_second": "nothing: perf/PHASE/tokens_per_second is always logged",
    "include_inputs_for_metrics": "nothing: it is not supported",
    "dispatch_batches": "nothing: there is no data loader",
    "split_batches": "nothing: there is no data loader",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_organization": "hub_model_id: ORGANISATION/NAME",
    "push_to_hub_token": "hub_token",
    "use_flash_attention_2": "attn_implementation",
}

# Fields of TRL's other trainers (GRPO, RLOO, Online DPO, DPO) -> what does that here.
OF_OTHER_TRAINERS = {
    "max_completion_length": "response_length",
    "max_new_tokens": "response_length",
    "max_prompt_length": "max_prompt_tokens, and long_prompts",
    "max_length": "max_prompt_tokens and response_length",
    "max_seq_length": "max_prompt_tokens and response_length",
    "num_generations": "nothing: one response per prompt; the critic stands for the group",
    "beta": "kl_coef",
    "rloo_k": "nothing: one response per prompt; the critic stands for the group",
    "num_iterations": "num_ppo_epochs",
    "epsilon": "cliprange",
    "epsilon_high": "cliprange",
    "steps_per_generation": "num_mini_batches",
    "generation_batch_size": "global_batch_size",
    "mask_truncated_completions": "missing_eos_penalty",
    "scale_rewards": "use_score_scaling, or whiten_advantages",
    "reward_clip_range": "score_clip",
    "normalize_rewards": "use_score_scaling and use_score_norm",
    "normalize_advantages": "whiten_advantages",
    "token_level_kl": "nothing: KL is always per token",
    "log_completions": "num_sample_generations",
    "num_completions_to_print": "num_sample_generations",
    "dataset_name": "prompt_dataset of the command, or the train_dataset argument of PPOTrainer",
    "reward_funcs": "the reward_model argument of PPOTrainer",
    "generation_kwargs": "temperature: samples come from the policy's full distribution",
    "top_p": "nothing: samples come from the policy's full distribution, at temperature",
    "top_k": "nothing: samples come from the policy's full distribution, at temperature",
    "min_p": "nothing: samples come from the policy's full distribution, at temperature",
    "repetition_penalty": "nothing: samples come from the policy's full distribution, at temperature",
    "cache_implementation": "cuda_graphs",
    "vllm_model_impl": "nothing: vLLM takes its own implementation of a model where it has one",
    "vllm_enable_sleep_mode": "vllm_gpu_memory_utilization, or vllm_mode: server",
    "vllm_importance_sampling_correction": "nothing: log-probs are computed here, by the model that learns",
    "disable_dropout": "nothing: dropout of base models is always off",
    "padding_free": "nothing: passes have no padding where a model can",
    "model_init_kwargs": "dtype and attn_implementation, or load the model with these arguments yourself",
    "ref_model_init_kwargs": "the ref_model argument of PPOTrainer",
    "reward_model_init_kwargs": "the reward_model argument of PPOTrainer",
    "adapter_name_or_path": "model_name_or_path: an adapter folder",
}

OLD_NAMES = OF_OTHER_TRAINERS | REMOVED | RENAMED


def refuse_renamed(names: Iterable[str], table: Mapping[str, str], where: str, kind: str = "a field") -> None:
    """A UserError for the first of `names` that is an old one, with what to use now. table: old name -> new."""
    for name in names:
        if name in table:
            source = "transformers 5" if name in REMOVED else "TRL 1.12"
            raise UserError(f"{where}: expected {kind} of {source}, found {name!r}: use {table[name]}")


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str, table: Mapping[str, str]) -> None:
    """A UserError for the first of `names` that is not known: with its new name if `table` has it."""
    known = set(known)
    unknown = [name for name in names if name not in known]
    refuse_renamed(unknown, table, where)
    for name in unknown:
        raise UserError(f"{where}: unknown field {name!r}{did_you_mean(name, known)}")


def new_name(name: str, known: Iterable[str]) -> str | None:
    """What to use for an old name where `known` are the fields; None if it is no old name, or one of other fields."""
    use = OLD_NAMES.get(name, "")
    first = use.replace(",", " ").replace(":", " ").split(" ")[0]
    return use if first == "nothing" or first in known else None
