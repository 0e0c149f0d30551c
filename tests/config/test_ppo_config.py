"""Every argument has an effect, is documented as having none, or is refused."""

import re
from dataclasses import MISSING, fields

import pytest
from transformers import TrainingArguments

from rlhf.config import PPOConfig, PPOStageConfig
from rlhf.config.old_names import OLD_NAMES, REMOVED
from rlhf.config.training_args import HONOURED, INERT, REFUSED
from rlhf.errors import UserError

# PPOConfig of TRL 1.12: names and defaults. What differs here is in DIFFERENT, and in the README.
TRL = {
    "learning_rate": 3e-6,
    "dataset_num_proc": None,
    "num_mini_batches": 1,
    "total_episodes": None,
    "local_rollout_forward_batch_size": 64,
    "num_sample_generations": 10,
    "response_length": 53,
    "stop_token": None,
    "stop_token_id": None,
    "temperature": 0.7,
    "missing_eos_penalty": None,
    "sft_model_path": "EleutherAI/pythia-160m",
    "reward_model_path": "EleutherAI/pythia-160m",
    "model_adapter_name": None,
    "ref_adapter_name": None,
    "num_ppo_epochs": 4,
    "whiten_rewards": False,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "cliprange": 0.2,
    "vf_coef": 0.1,
    "cliprange_value": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
    "ds3_gather_for_generation": True,
    "push_to_hub": False,
    "gradient_checkpointing": True,
}
# For each refused field a value, not the default, that TrainingArguments itself accepts.
OTHER = {
    str: "x",
    type(None): "x",
    int: 7,
    float: 0.5,
    list: ["x"],
}


def config(**options):
    return PPOConfig(output_dir="unused", use_cpu=True, bf16=False, **options)


def test_every_field_of_training_arguments_has_an_answer():
    known = {field.name for field in fields(TrainingArguments)}
    listed = [set(HONOURED), set(INERT), set(REFUSED)]
    assert set.union(*listed) == known  # fails if a new release of transformers adds a field
    assert sum(map(len, listed)) == len(known)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_field_that_would_be_ignored_is_refused(name):
    field = next(field for field in fields(PPOConfig) if field.name == name)
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    value = not default if isinstance(default, bool) else OTHER[type(default)]
    with pytest.raises(UserError, match=f"^{name}: expected .*found"):
        config(**{name: value})
    config(**{name: default})


@pytest.mark.parametrize("name", sorted(TRL))
def test_names_and_defaults_are_those_of_trl(name):
    assert getattr(config(), name) == TRL[name]


@pytest.mark.parametrize("name", sorted(OLD_NAMES))
def test_an_old_name_is_answered_by_the_new_one(name):
    new, mine = re.split("[ ,:]", OLD_NAMES[name])[0], {field.name for field in fields(PPOStageConfig)}
    elsewhere = {
        "dtype",
        "model_name_or_path",
        "attn_implementation",
        "train_sampling_strategy",
        "prompt_dataset",
    }  # ModelConfig's, reward's, PromptConfig's
    assert name not in mine
    assert new in mine | elsewhere | {"the", "nothing"}, new
    with pytest.raises(UserError, match=f"^PPOConfig: .*found '{name}': use {re.escape(OLD_NAMES[name])}"):
        config(**{name: 1})


def test_every_field_that_transformers_has_removed_is_known():
    """Those of transformers 4.57, but for what 5 still has."""
    gone = (
        "adafactor dispatch_batches evaluation_strategy fp16_backend fp16_opt_level fsdp_min_num_params "
        "fsdp_transformer_layer_cls_to_wrap group_by_length half_precision_backend include_inputs_for_metrics "
        "include_tokens_per_second jit_mode_eval logging_dir mp_parameters no_cuda overwrite_output_dir past_index "
        "per_gpu_eval_batch_size per_gpu_train_batch_size push_to_hub_model_id push_to_hub_organization "
        "push_to_hub_token ray_scope save_safetensors split_batches torchdynamo tpu_metrics_debug tpu_num_cores "
        "use_ipex use_legacy_prediction_loop use_mps_device warmup_ratio"
    )
    assert set(gone.split()) <= REMOVED.keys()
    assert not REMOVED.keys() & {field.name for field in fields(TrainingArguments)}


def test_a_name_that_nobody_had_is_a_line_too():
    with pytest.raises(UserError, match=r"^PPOConfig: unknown field 'learning_rat'; did you mean 'learning_rate'\?$"):
        config(learning_rat=1)


@pytest.mark.parametrize(
    ("rows", "parts", "near"), [(8, 3, "2 or 4"), (6, 4, "3 or 6"), (2, 5, "2 or 2"), (4, 8, "4 or 4")]
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(rows, parts, near):
    words = f"per_device_train_batch_size x gradient_accumulation_steps = {rows}, such as {near}, found {parts}"
    with pytest.raises(UserError, match=words):
        config(per_device_train_batch_size=1, gradient_accumulation_steps=rows, num_mini_batches=parts)


def test_mini_batches_divide_the_rollout_of_a_rank_as_in_trl():
    args = config(per_device_train_batch_size=8, gradient_accumulation_steps=1, num_mini_batches=4)
    assert (args.local_batch_size, args.local_mini_batch_size) == (8, 2)
    with pytest.raises(UserError, match="= 6, such as 3 or 6, found 4"):
        config(per_device_train_batch_size=3, gradient_accumulation_steps=2, num_mini_batches=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_ppo_epochs": 0}, "num_ppo_epochs: expected at least 1"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"target_kl": -1.0}, "target_kl: expected a positive number or none"),
        ({"lam": 1.5}, "lam: expected a number from 0 to 1"),
        ({"kl_coef": float("nan")}, "kl_coef: expected 0 or more"),
        ({"reward_weights": [1.0, float("nan")]}, "reward_weights: expected finite numbers"),
        ({"use_vllm": True, "temperature": 0.009}, "temperature: expected 0.01 to 2 with use_vllm.*, found 0.009"),
        ({"use_vllm": True, "temperature": 2.5}, "temperature: expected 0.01 to 2 with use_vllm.*, found 2.5"),
        ({"vllm_mode": "serve"}, "vllm_mode: expected server or colocate, found serve"),
        ({"vllm_server_base_url": "gpu7:8000"}, "vllm_server_base_url: expected http://HOST:PORT, found 'gpu7:8000'"),
        ({"vllm_server_port": 0}, "vllm_server_port: expected at least 1"),
        ({"vllm_server_timeout": -1}, "vllm_server_timeout: expected 0 or more"),
        ({"vllm_max_model_length": 0}, "vllm_max_model_length: expected a positive number or none"),
        ({"vllm_gpu_memory_utilization": 1.1}, "vllm_gpu_memory_utilization: expected a number from 0 to 1"),
        ({"stop_token": "eos", "stop_token_id": 0}, "stop_token_id: set it or stop_token, not both"),
        ({"save_strategy": "best"}, "save_strategy: expected no, steps or epoch"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end: .*, found no and steps"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 4},
            "multiple of .* 3 ",
        ),
        ({"metric_for_best_model": "scores"}, "metric_for_best_model: set eval_strategy"),
        ({"metric_for_best_model": "eval_kl", "eval_strategy": "epoch"}, "greater_is_better: expected true or false"),
        ({"ds3_gather_for_generation": False}, "ds3_gather_for_generation: expected True"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy: expected end or every_save, found checkpoint"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "load_best_model_at_end: .*, found no and no"),
    ],
)
def test_impossible_values_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        config(**options)


def test_sizes_follow_from_one_another():
    args = config(per_device_train_batch_size=3, gradient_accumulation_steps=8, num_mini_batches=4)
    assert (args.local_batch_size, args.batch_size, args.micro_batch_size) == (24, 24, 3)
    assert (args.local_mini_batch_size, args.mini_batch_size) == (6, 6)


@pytest.mark.parametrize(("steps", "fits"), [(6, True), (3, True), (4, False), (1, False)])
def test_without_eval_steps_evaluations_come_as_often_as_rows_are_logged(steps, fits):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "logging_steps": 3, "save_steps": steps}
    if fits:
        assert config(**options).metric_for_best_model == "eval_scores"
        return
    with pytest.raises(UserError, match="save_steps: expected a multiple of eval_steps 3 "):
        config(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2.5},  # vLLM's limit holds for vLLM alone
        {"use_vllm": True, "temperature": 2.0},
        {"use_vllm": True, "temperature": 0.01},
        {"vllm_server_base_url": "https://gpu7:8000"},
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch", "logging_steps": 3},
        {"metric_for_best_model": "eval_rewards/mean", "eval_strategy": "steps"},
        {"metric_for_best_model": "eval_reward", "eval_strategy": "steps"},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.3},
    ],
)
def test_what_is_possible_is_allowed(options):
    found = config(**options)
    assert found.greater_is_better is (
        True if "metric_for_best_model" in options or found.load_best_model_at_end else None
    )


def test_a_share_of_the_run_is_no_multiple_of_steps():
    words = "mixing ratio and absolute steps for save_steps 0.5 and eval_steps 2"  # transformers'
    with pytest.raises(ValueError, match=words):
        config(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_steps=0.5)


def test_whether_greater_is_better_is_the_users_word_before_the_metrics_name():
    args = config(metric_for_best_model="eval_scores", eval_strategy="steps", greater_is_better=False)
    assert args.greater_is_better is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"do_predict": True}, "do_predict"),
        ({"do_predict": True, "eval_strategy": "steps"}, "do_predict"),
        ({"do_eval": True}, "do_eval"),
        ({"do_eval": True, "eval_strategy": "steps"}, None),
    ],
)
def test_a_stage_evaluates_by_its_strategy_alone(options, words):
    options |= {"output_dir": "unused", "use_cpu": True, "bf16": False}
    if words is None:
        assert PPOStageConfig(**options).do_eval
        return
    with pytest.raises(UserError, match=f"^{words}: expected false, found true: use eval_strategy$"):
        PPOStageConfig(**options)
