"""DeepSpeed's config files as transformers documents them: filled in, or one line that says what differs."""

from types import SimpleNamespace

import pytest
import tiny

from rlhf.config import PPOConfig
from rlhf.distributed.deepspeed_config import configure_deepspeed, fill_sizes
from rlhf.errors import UserError

ADAMW = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
WARMUP = {"type": "WarmupLR", "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")}
DECAY = {"type": "WarmupDecayLR", "params": WARMUP["params"] | {"total_num_steps": "auto"}}
SIZES = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")


def arguments(**options):
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "max_grad_norm": 0.5}
    settings |= {"adam_beta2": 0.95, "weight_decay": 0.1, "learning_rate": 1e-4, "warmup_steps": 5}
    return PPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, **settings | options)


@pytest.fixture(autouse=True)
def two_processes(monkeypatch):
    monkeypatch.setattr(PPOConfig, "world_size", 2)


def configured(config, args=None, counted=1):
    """The config after it was filled in."""
    configure_deepspeed(SimpleNamespace(deepspeed_config=config), args or arguments(), counted)
    return config


def test_of_a_trainer_that_lets_the_engine_count_the_batch_is_that_of_an_update():
    assert configured({"gradient_accumulation_steps": 1, "train_batch_size": "auto"}, counted=4) == dict(
        zip(SIZES, (3, 4, 24, 0.5), strict=True)
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        dict.fromkeys(SIZES, "auto"),
        {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 4, "train_batch_size": 24},
        {"gradient_accumulation_steps": 1, "gradient_clipping": 0.5},
    ],
)
@pytest.mark.parametrize("blocks", [{}, {"optimizer": ADAMW}, {"optimizer": ADAMW, "scheduler": DECAY}])
def test_sizes_are_those_of_the_arguments_and_blocks_that_agree_are_taken_out(sizes, blocks):
    # Accumulation is the learner's: a step of the engine is an optimizer step, whatever gradient_accumulation_steps.
    assert configured({**sizes, **blocks, "steps_per_print": 2000}) == {
        **dict(zip(SIZES, (3, 1, 6, 0.5), strict=True)),
        "steps_per_print": 2000,
    }


@pytest.mark.parametrize(
    ("block", "given", "taken"),
    [
        (WARMUP, "linear", "constant_with_warmup"),
        (DECAY, "linear", "linear"),
        (WARMUP, "constant_with_warmup", "constant_with_warmup"),
    ],
)
def test_deepspeeds_schedules_are_those_of_transformers_that_equal_them(block, given, taken):
    args = arguments(lr_scheduler_type=given)
    configured({"scheduler": block}, args)
    assert args.lr_scheduler_type == taken


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"train_batch_size": 6}, {}),  # of one micro-batch
        ({"gradient_clipping": 0.0}, {"max_grad_norm": -1.0}),
        ({"optimizer": {"type": "AdamW"}}, {}),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": True, "torch_adam": False}}},
            {"optim": "adamw_torch"},
        ),
        ({"optimizer": {"type": "adamw", "params": {"torch_adam": True, "bias_correction": True}}}, {}),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8}}},
            {"adam_epsilon": 1e-8},
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1, "warmup_min_lr": 0}}},
            {"warmup_steps": 0},
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 5, "total_num_steps": 7}}},
            {"max_steps": 7},
        ),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4, "warmup_type": "linear"}}}, {}),
    ],
)
def test_a_file_that_says_the_same_is_taken(config, options):
    args = arguments(**options)
    assert configured(dict(config), args)["gradient_clipping"] == max(args.max_grad_norm, 0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"train_micro_batch_size_per_gpu": 7},
            "train_micro_batch_size_per_gpu is 7, but per_device_train_batch_size of",
        ),
        (
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps is 2, but gradient_accumulation_steps of the settings",
        ),
        ({"train_batch_size": 12}, "train_batch_size is 12, but .* x processes of the settings is 24"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but max_grad_norm of the settings is 0.5"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}},
            "optimizer.params.lr is 1e-05, but learning_rate of the settings",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}}, "optimizer.params.betas is"),
        ({"optimizer": {"type": "AdamW", "params": {"freeze_step": 1}}}, "expected no optimizer.params.freeze_step"),
        ({"optimizer": {"type": "OneBitAdam"}}, "expected an optimizer block of AdamW .*, found OneBitAdam with optim"),
        (
            {"scheduler": {"type": "OneCycle"}},
            "expected a scheduler block of WarmupLR or WarmupDecayLR .*, found OneCycle",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}},
            "scheduler.params.warmup_max_lr is 0.001",
        ),
        *(
            ({"optimizer": {"type": "AdamW", "params": {name: value}}}, f"optimizer.params.{name} is")
            for name, value in {
                "eps": 1e-6,
                "weight_decay": 0.0,
                "adam_w_mode": False,
                "bias_correction": False,
            }.items()
        ),
        *(
            ({"scheduler": {"type": "WarmupDecayLR", "params": {name: value}}}, f"scheduler.params.{name} is")
            for name, value in {"warmup_min_lr": 1e-6, "warmup_type": "log", "total_num_steps": 8}.items()
        ),
        ({"scheduler": {"type": "WarmupLR", "params": {"cycle": 1}}}, "expected no scheduler.params.cycle"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}},
            "scheduler.params.warmup_num_steps is 9, but",
        ),
    ],
)
def test_what_the_file_says_otherwise_is_one_line(config, words):
    with pytest.raises(UserError, match=f"^DeepSpeed's config: {words}"):
        configured(config)


@pytest.mark.parametrize(
    ("config", "options"),
    [({"optimizer": ADAMW}, {"optim": "adafactor"}), ({"scheduler": WARMUP}, {"lr_scheduler_type": "cosine"})],
)
def test_a_block_that_the_arguments_contradict_is_refused(config, options):
    with pytest.raises(UserError, match=f"^DeepSpeed's config: expected .* found .*{next(iter(options.values()))}"):
        configured(config, arguments(**options))


def test_sizes_of_the_model_are_filled_in_as_transformers_does():
    from accelerate.utils import DeepSpeedPlugin

    names = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 3} | dict.fromkeys(names, "auto")})
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    fill_sizes(accelerator, tiny.gpt2().config)  # of 32 hidden units, by another name
    found = plugin.deepspeed_config["zero_optimization"]
    assert [found[name] for name in names] == [1024, 921, 320]
    plugin.deepspeed_config["prescale_gradients"] = "auto"
    with pytest.raises(UserError, match=r"^DeepSpeed's config: expected a value for prescale_gradients, found auto$"):
        fill_sizes(accelerator, tiny.gpt2().config)
