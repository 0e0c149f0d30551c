"""The last value of each setting that is allowed, and the next one, which is refused by its name."""

import pytest

from rlhf.config import (
    BenchmarkConfig,
    EvaluationConfig,
    GpuCheckConfig,
    ModelConfig,
    PipelineConfig,
    PPOConfig,
    PPOStageConfig,
    PreferenceConfig,
    PromptConfig,
    RatingConfig,
    RewardStageConfig,
)
from rlhf.config.fields import check_plain_name
from rlhf.config.model import check_ppo_model_config, check_reward_model_config
from rlhf.errors import UserError

TINY, LAST_SEED = 1e-9, 2**32 - 1
NAN = float("nan")


def training(kind):
    return lambda **given: kind(**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"} | given)


def adapter(check):
    return lambda **given: check(ModelConfig(model_name_or_path="x", use_peft=True, **given))


# Names -> what is allowed, what is not.
COUNTS = ((1,), (0, -1))
POSITIVE = ((TINY,), (0, -TINY, NAN))
NOT_NEGATIVE = ((0, TINY), (-TINY, NAN))
SEEDS = ((0, LAST_SEED), (-1, LAST_SEED + 1))
SHARES = ((0.0, 1.0), (-TINY, 1 + TINY, NAN))
BELOW_1 = ((0.0, 1 - TINY), (-TINY, 1.0))
WITHIN_1 = ((TINY, 1 - TINY), (0.0, 1.0))
TRAINING = {
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
    "torch_empty_cache_steps max_skipped_updates global_batch_size": COUNTS,
    "learning_rate weight_decay adam_epsilon eval_delay": NOT_NEGATIVE,
    "warmup_steps": ((0, 1), (-TINY,)),
    "num_train_epochs": POSITIVE,
    "eval_steps save_steps logging_steps": ((TINY, 1), (0, -1)),
    "adam_beta1 adam_beta2": BELOW_1,
    "max_steps": ((-1, 1), (0, -2)),
    "seed data_seed": SEEDS,
}
PPO = {
    "num_mini_batches num_ppo_epochs response_length local_rollout_forward_batch_size max_prompt_tokens "
    "micro_batch_tokens": COUNTS,
    "temperature cliprange cliprange_value kl_horizon target_kl score_clip critic_learning_rate save_minutes": POSITIVE,
    "critic_warmup_steps score_norm_samples num_sample_generations": ((0,), (-1,)),
    "kl_coef vf_coef": NOT_NEGATIVE,
    "gamma lam": SHARES,
    "kl_target": ((1.0,), (0.0, -1.0)),
    "reward_weights": (([0.0, -1.0],), ([1.0, NAN], [float("inf")])),
}
CASES = [
    (training(PPOConfig), TRAINING | PPO),
    (training(PPOStageConfig), {"eval_prompts": COUNTS}),
    (training(RewardStageConfig), TRAINING | {"max_length": ((2,), (1,)), "margin": POSITIVE}),
    (PreferenceConfig, {"max_examples validation_examples test_examples": COUNTS}),
    (PromptConfig, {"max_prompt_length train_prompts evaluation_prompts": COUNTS, "rating_prompts": ((0,), (-1,))}),
    (
        EvaluationConfig,
        {
            "eval_batch_size eval_response_length ddp_timeout": COUNTS,
            "eval_temperature": POSITIVE,
            "confidence": WITHIN_1,
            "eval_seed": SEEDS,
            "reward_weights": (([0.0, -1.0],), ([1.0, NAN], [float("inf")])),
        },
    ),
    (
        RatingConfig,
        {
            "port": ((0, 65535), (-1, 65536)),
            "rating_confidence": WITHIN_1,
            "rating_repeats": ((0,), (-1,)),
            "rating_seed": SEEDS,
        },
    ),
    (PipelineConfig, {"num_processes": COUNTS, "seed": SEEDS}),
    (lambda **given: BenchmarkConfig(work="reward", **given), {"pairs": COUNTS, "steps": ((2,), (1,))}),
    (GpuCheckConfig, {"minutes slower": POSITIVE}),
    *(
        (adapter(check), {"lora_r lora_alpha": COUNTS, "lora_dropout": BELOW_1})
        for check in (check_ppo_model_config, check_reward_model_config)
    ),
]


@pytest.mark.parametrize(("build", "limits"), CASES)
def test_the_last_value_is_allowed_and_the_next_one_is_not(build, limits):
    for names, (allowed, refused) in limits.items():
        for name in names.split():
            for value in allowed:
                build(**{name: value})
            for value in refused:
                with pytest.raises(UserError, match=rf"^({name}|pairs, steps): "):
                    build(**{name: value})


def test_a_margin_counts_where_it_is_used():
    training(RewardStageConfig)(margin=0.0, loss_type="bradley_terry")


@pytest.mark.parametrize(
    ("seeds", "found"),
    [
        ("7", [7]),
        ("1-3, 5", [1, 2, 3, 5]),
        ("4-4", [4]),
        ("0-999", list(range(1000))),
        ("0-1000", None),
        ("0-999,1000", None),
        ("999999999", [999999999]),
        ("1000000000", None),
        ("1-", None),
        ("", None),
        ("1-2,2", None),
    ],
)
def test_seeds_of_several_runs(seeds, found):
    if found is None:
        with pytest.raises(UserError, match=r"^seeds: expected "):
            PipelineConfig(seeds=seeds)
    else:
        assert PipelineConfig(seeds=seeds).seed_list() == found
    PipelineConfig(seeds=seeds, executor="slurm")  # whose jobs read it


def test_the_longest_name_of_a_run():
    check_plain_name("run", "x" * 200)
    check_plain_name("run", "ä" * 100)  # of two bytes each
    for name in ("x" * 201, "ä" * 101, "-x"):
        with pytest.raises(UserError, match=r"^run: expected a plain folder name"):
            check_plain_name("run", name)


def test_options_of_slurm_belong_to_slurm():
    for seeds in (None, "1-3"):
        assert PipelineConfig(executor="slurm", sbatch="--nodes=2", seeds=seeds).sbatch == "--nodes=2"
        with pytest.raises(UserError, match=r"^sbatch: add --executor slurm"):
            PipelineConfig(sbatch="--nodes=2", seeds=seeds)


def test_an_empty_folder_of_pairs_is_none():
    assert PreferenceConfig(dataset_dir="").dataset_dir is None  # as --dataset_dir "" says on a command line
    assert PreferenceConfig(dataset_dir="harmless-base").dataset_dir == "harmless-base"
