"""The account of memory against values by hand."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config

from rlhf.errors import UserError
from rlhf.memory_estimate import account
from rlhf.memory_estimate.account import (
    GB,
    Part,
    Sharding,
    by_depth,
    by_rows,
    kept_bytes,
    peak,
    shallow,
    table,
    verdict,
)


def test_autograd_keeps_the_input_and_the_weights_are_there_anyway():
    model, states = torch.nn.Linear(4, 3, bias=False), torch.ones(10, 4, requires_grad=True)
    assert kept_bytes(lambda: model(states), model) == 10 * 4 * 4
    other = torch.nn.Linear(4, 3, bias=False)
    assert kept_bytes(lambda: other(states), model) == 10 * 4 * 4 + 4 * 3 * 4  # no parameter of this model
    assert kept_bytes(lambda: torch.add(model(states), model(states)), model) == 10 * 4 * 4  # once


def test_what_is_measured_on_one_and_two_goes_on_as_a_line():
    """30 for what is there once, 5 for each layer or row."""
    assert [by_depth(lambda layers: 30 + 5 * layers, n) for n in (1, 2, 12)] == [35, 40, 90]
    assert [by_rows(lambda rows: 30 + 5 * rows, n) for n in (1, 2, 12)] == [35, 40, 90]


def test_a_shallow_model_is_a_copy_with_the_first_layers():
    config = GPT2Config(n_layer=3)
    config.layer_types = ["a", "b", "c"]
    found = shallow(config, 2)
    assert (found.num_hidden_layers, found.layer_types) == (2, ["a", "b"])
    assert (config.num_hidden_layers, config.layer_types) == (3, ["a", "b", "c"])


def test_the_largest_phase_counts_and_saving_is_one():
    saving = [Part("merged", saving=9), Part("policy", 1, 2, rollout=3, learning=4)]
    assert peak(saving, 10, keeps_freed=False) == 10 + 3 + 9
    assert peak(saving, 10, keeps_freed=True) == 10 + 3 + 4 + 1.5 + 9


def test_every_column_has_its_own_figures():
    head, line, base = table([Part("policy", *(GB * n for n in range(1, 7)))], 7 * GB)
    assert head.split()[3:] == ["weights", "optimizer", "gradients", "rollout", "learning", "saving"]
    assert line.split() == ["policy", "1.00", "2.00", "3.00", "4.00", "5.00", "6.00"]
    assert base.split()[-1] == "7.00"


@pytest.mark.parametrize(
    ("use_cpu", "keeps", "need"), [(True, False, "5.00"), (True, True, "6.00"), (False, True, "5.00")]
)
def test_only_a_cpus_allocator_keeps_what_is_freed_where_it_is_told_to(monkeypatch, use_cpu, keeps, need):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    if keeps:
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    asked, said = [], []
    monkeypatch.setattr(account, "device_bytes", lambda use_cpu: asked.append(use_cpu) or 6 * GB)
    parts = [Part("activations", rollout=4 * GB, learning=2 * GB)]
    verdict(parts, GB, use_cpu, said.append)
    assert said[-1] == f"peak: {need} GB of 6.0 GB per device"  # just as much as there is: no error
    assert asked == [use_cpu]
    with pytest.raises(UserError, match=r"needs 7\.2 GB per device, but 6\.0 GB are available") as error:
        verdict([*parts, Part("more", weights=(7.2 - float(need)) * GB)], GB, use_cpu, said.append)
    assert "the table above" in str(error.value)


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    one = account.device_bytes(use_cpu=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert account.device_bytes(use_cpu=True) == one / 4


def test_a_process_on_a_gpu_has_its_context_and_on_a_cpu_what_it_takes_now():
    assert account.base_bytes(use_cpu=False) == 5e8
    assert 5e7 < account.base_bytes(use_cpu=True) < 1e11
    assert account.base_bytes(use_cpu=True) != 5e8


@pytest.mark.parametrize(("bf16", "fp16"), [(True, False), (False, True), (False, False)])
def test_what_the_launcher_has_set_up(monkeypatch, bf16, fp16):
    monkeypatch.setattr(account, "process_count", lambda: 4)
    args = SimpleNamespace(deepspeed_plugin=None, use_cpu=False, bf16=bf16, fp16=fp16)
    assert Sharding.of(args) == Sharding(0, 4)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3, offload_optimizer_device="cpu", offload_param_device="none")
    assert Sharding.of(args) == Sharding(3, 4, offload=True, half=bf16 or fp16)
    args.deepspeed_plugin.offload_param_device, args.deepspeed_plugin.offload_optimizer_device = "nvme", None
    assert Sharding.of(args) == Sharding(3, 4, offload_weights=True, half=bf16 or fp16)
    args.use_cpu = True  # they are in main memory anyway
    assert Sharding.of(args) == Sharding(3, 4, half=bf16 or fp16)
