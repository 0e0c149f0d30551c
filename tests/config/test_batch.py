"""The global batch size and what it determines; checks of devices."""

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from rlhf.cli.parsing import read_recipe
from rlhf.config import PPOConfig, PPOStageConfig, RewardStageConfig
from rlhf.config.batch import batch_facts, batch_line
from rlhf.distributed.collectives import join_processes
from rlhf.distributed.devices import check_processes
from rlhf.errors import UserError
from rlhf.storage.stages import RECIPES

KINDS = [PPOStageConfig, RewardStageConfig]


@pytest.fixture
def processes(monkeypatch):
    """Pretend that the launcher has started that many processes."""

    def start(number):
        monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: number))
        monkeypatch.setattr("rlhf.config.batch.process_count", lambda: number)

    return start


def config(kind, **options):
    return kind(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("number", "rows", "parts"), [(1, 16, 4), (2, 16, 2), (4, 16, 1), (8, 8, 1), (16, 4, 1), (64, 1, 1)]
)
def test_the_share_of_a_process_follows_from_the_global_batch(processes, kind, number, rows, parts):
    """64 rows, 16 at a time, by hand."""
    processes(number)
    args = config(kind, global_batch_size=64, per_device_train_batch_size=16)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (rows, parts)
    assert batch_facts(args)["global_batch_size"] == 64
    assert batch_line(args, "pairs") == (
        f"batch: 64 pairs per step = {number} processes x {rows} pairs at a time x {parts} "
        "(gradient_accumulation_steps)"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("number", "options", "words"),
    [
        (
            3,
            {"global_batch_size": 64},
            "^global_batch_size: expected a multiple of the number of processes, 3, found 64: "
            "start 2 or 4 processes, or use 63 or 66$",
        ),
        (9, {"global_batch_size": 8}, "found 8: start 8 processes, or use 9$"),
        (
            2,
            {"global_batch_size": 64, "per_device_train_batch_size": 12},
            "^per_device_train_batch_size: expected a divisor of a process's share of global_batch_size, "
            "64 / 2 = 32, such as 8 or 16, found 12$",
        ),
        (
            2,
            {"global_batch_size": 64, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4},
            "^gradient_accumulation_steps: remove 4, or set 2, which follows from global_batch_size 64$",
        ),
        (
            2,
            {"global_batch_size": 64, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            "^gradient_accumulation_steps: remove 2, or set 8, which follows from global_batch_size 64$",
        ),
        (1, {"global_batch_size": 0}, "^global_batch_size: expected "),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_do(processes, kind, number, options, words):
    processes(number)
    with pytest.raises(UserError, match=words):
        config(kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_global_batch_the_settings_are_each_process_own(processes, kind):
    processes(2)
    args = config(kind, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 3)
    assert batch_facts(args)["global_batch_size"] == 24


def test_what_was_derived_can_be_read_again(processes):
    processes(4)
    args = config(PPOConfig, global_batch_size=64, per_device_train_batch_size=4)
    again = config(
        PPOConfig,
        global_batch_size=args.global_batch_size,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )
    assert batch_facts(again) == batch_facts(args)
    assert (args.local_batch_size, args.batch_size) == (16, 64)


def test_sizes_of_a_rank_and_of_all(processes):
    processes(4)
    args = config(PPOConfig, per_device_train_batch_size=2, gradient_accumulation_steps=3, num_mini_batches=3)
    assert (args.local_batch_size, args.local_mini_batch_size) == (6, 2)
    assert (args.batch_size, args.mini_batch_size, args.micro_batch_size) == (24, 8, 8)


def test_the_kl_horizon_is_longer_than_a_fifth_of_all_ranks_samples(processes):
    processes(4)
    given = {"per_device_train_batch_size": 5, "kl_target": 0.1}
    with pytest.raises(UserError, match=r"^kl_horizon: expected more than 0\.2 x 20 samples per step = 4, found 4$"):
        config(PPOConfig, kl_horizon=4.0, **given)
    assert config(PPOConfig, kl_horizon=4.1, **given).kl_horizon == 4.1


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_states_the_global_batch_and_no_accumulation(path: Path):
    recipe = read_recipe(path)
    if path.stem == "evaluation":
        return
    assert recipe["global_batch_size"] % recipe["per_device_train_batch_size"] == 0
    assert "gradient_accumulation_steps" not in recipe


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_sees_eight_devices_uses_one(kind):
    args = config(kind, per_device_train_batch_size=4, per_device_eval_batch_size=2)
    args._n_gpu = 8  # what transformers finds where eight are visible
    assert (args.n_gpu, args.train_batch_size, args.eval_batch_size) == (1, 4, 2)


@pytest.fixture
def gpus(monkeypatch):
    def there(number):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: number)

    return there


def test_two_processes_on_one_device_are_refused(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = "^processes: expected at most 1 on this machine, one per visible device, found 2: "
    with pytest.raises(UserError, match=words):
        check_processes(use_cpu=False)
    check_processes(use_cpu=True)
    gpus(2)
    check_processes(use_cpu=False)


def test_processes_that_cannot_meet_are_refused(monkeypatch):
    """As under a bare srun, whose wrapper sets some of the names."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^processes: WORLD_SIZE is 2, but RANK and MASTER_ADDR not set: start"):
        PPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="but MASTER_ADDR not set"):
        join_processes()
    monkeypatch.setenv("MASTER_ADDR", "n1")
    check_processes(use_cpu=True)  # Accelerate has a port for CPUs
    with pytest.raises(UserError, match="but MASTER_PORT not set"):
        check_processes(use_cpu=False)
