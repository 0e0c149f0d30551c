"""Every field of TrainingArguments that PPOConfig supports has an effect."""

import ast
import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from torch.optim import SGD
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from rlhf.config import PPOConfig, PPOStageConfig, trackers
from rlhf.config.schedule import make_schedule
from rlhf.config.training_args import HONOURED, INERT
from rlhf.errors import UserError

ROOT = Path(__file__).parents[2] / "rlhf"
OPTIMIZER = (Trainer.get_optimizer_cls_and_kwargs, "args.{}")
LEVEL = (TrainingArguments.get_process_log_level, "self.{}")
# Fields that transformers reads on this package's behalf: by what, and as what text.
THROUGH = {
    "adam_beta1": OPTIMIZER,
    "adam_beta2": OPTIMIZER,
    "adam_epsilon": OPTIMIZER,
    "optim_args": OPTIMIZER,
    "optim": OPTIMIZER,
    "logging_strategy": (DefaultFlowCallback, "args.{}"),
    "logging_first_step": (DefaultFlowCallback, "args.{}"),
    "eval_delay": (DefaultFlowCallback, "args.{}"),
    "eval_strategy": (DefaultFlowCallback, "args.{}"),
    "save_strategy": (DefaultFlowCallback, "args.{}"),
    "logging_steps": (TrainerState.compute_steps, '"logging"'),
    "eval_steps": (TrainerState.compute_steps, '"eval"'),
    "save_steps": (TrainerState.compute_steps, '"save"'),
    "log_level": LEVEL,
    "log_level_replica": LEVEL,
    "log_on_each_node": (TrainingArguments.should_log.fget, "self.{}"),
    "tf32": (TrainingArguments.__post_init__, "self.{}"),
    "activation_checkpointing": (TrainingArguments.__post_init__, '"{}"'),
    "activation_checkpointing_kwargs": (TrainingArguments.__post_init__, '"{}"'),
    "ddp_backend": (TrainingArguments._setup_devices.func, "self.{}"),
    "ddp_timeout": (TrainingArguments._setup_devices.func, "self.{}"),
}
# How this package comes to what is in THROUGH, where the name is another.
CALLED = {"should_log": "get_process_log_level", "_setup_devices": "__post_init__"}


def mentions():
    """(fields read as `args.NAME` or, by a property of PPOConfig, `self.NAME`; all names and attributes used)."""
    read, used = set(), set()
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            checks = function.name.startswith(("check", "_check", "refuse", "__post_init__"))
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and not checks:
                    owner = ast.unparse(node.value)
                    if owner in ("args", "self.args") or (owner == "self" and path.name == "ppo.py"):
                        read.add(node.attr)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Name):
                used.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return read, used


READ, USED = mentions()


@pytest.mark.parametrize("name", sorted(HONOURED))
def test_an_honoured_field_is_read_here_or_by_what_is_called_here(name):
    if name not in THROUGH:
        assert name in READ
        return
    where, text = THROUGH[name]
    assert text.format(name) in inspect.getsource(where)
    called = where.__name__
    assert CALLED.get(called, called) in USED


@pytest.mark.parametrize(
    "name", sorted({field.name for field in fields(TrainingArguments)} - HONOURED - {"local_rank"})
)
def test_a_field_that_is_not_read_is_refused_by_the_script_when_set(name):
    """The library accepts do_train and similar fields for users' scripts; train_ppo.py refuses the others."""
    field = next(field for field in fields(PPOStageConfig) if field.name == name)
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    values = {str: "x", type(None): "x", int: 7, float: 0.5, list: ["x"]}
    value = not default if isinstance(default, bool) else values[type(default)]
    options = {"output_dir": "unused", "use_cpu": True, "bf16": False, name: value}
    if name == "do_train":
        assert PPOStageConfig(**options).do_train
        return
    with pytest.raises(UserError, match=f"^{name}: expected .*found"):
        PPOStageConfig(**options)
    if name in INERT:
        assert getattr(PPOConfig(**options), name) == value


def config(**options):
    return PPOConfig(output_dir="unused", use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"report_to": "wandb"}, "report_to: wandb is not installed: pip install wandb"),
        ({"report_to": ["tensorboard", "comet_ml"]}, "comet_ml is not installed: pip install comet-ml"),
        ({"report_to": "azure_ml"}, "report_to: expected none, all, or a list of .*tensorboard.*, found 'azure_ml'"),
        ({"report_to": "tensorbord"}, "found 'tensorbord'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "which needs a metric"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type: expected one of .*reduce_lr_on_plateau"),
        ({"lr_scheduler_type": "greedy"}, "which needs a metric"),
        ({"lr_scheduler_type": "zigzag"}, "lr_scheduler_type: expected one of linear, .*, found zigzag"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs: expected .*num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs: expected .*min_lr"),
        ({"lr_scheduler_kwargs": {"nonsense": 1}}, "lr_scheduler_kwargs: expected .*nonsense"),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycles": 2}},
            "lr_scheduler_kwargs: expected none",
        ),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "warmup_steps: expected 0 .*constant_with_warmup"),
        ({"learning_rate": -1.0}, "learning_rate: expected 0 or more"),
        ({"save_on_each_node": True}, "save_on_each_node: expected False"),
        (
            {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"num_cycles": 2}},
            "lr_scheduler_kwargs: expected none with lr_scheduler_type constant_with_warmup",
        ),
        ({"report_to": "nnone"}, r"found 'nnone'; did you mean 'none'\?"),
    ],
)
def test_what_would_fail_or_be_dropped_later_is_one_line_at_the_start(options, words, monkeypatch):
    monkeypatch.setattr("rlhf.config.trackers.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=words) as error:
        config(**options)
    assert "\n" not in str(error.value)


def test_report_to_names_trackers_that_are_there(monkeypatch):
    monkeypatch.setattr("rlhf.config.trackers.get_available_trackers", lambda: ["tensorboard", "trackio"])
    for asked, found in (("all", ["tensorboard", "trackio"]), ("none", []), (None, []), ("trackio", ["trackio"])):
        assert config(report_to=asked).report_to == found
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "mine", object)  # that the user has registered
    assert config(report_to=["mine", "tensorboard"]).report_to == ["mine", "tensorboard"]


def test_options_of_the_schedule_are_kept():
    args = config(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr_rate": 0.1}')
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


@pytest.mark.parametrize("warmup", [2, 0.5])  # steps, or their share
def test_the_learning_rate_rises_over_the_warmup_steps(warmup):
    args = config(lr_scheduler_type="constant_with_warmup", warmup_steps=warmup, learning_rate=1.0)
    optimizer = SGD([torch.zeros(1, requires_grad=True)], 1.0)
    schedule, found = make_schedule(args, optimizer, 4), []
    for _ in range(4):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert found == [0.0, 0.5, 1.0, 1.0]
