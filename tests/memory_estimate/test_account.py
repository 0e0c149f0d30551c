"""The account of memory against values by hand."""

import os
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
    assert kept_bytes(lambda: model(states[:3]), model) == 10 * 4 * 4  # a part keeps the whole


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


@pytest.mark.parametrize(
    ("text", "found"), [("VmSize:\t 900 kB\nVmRSS:\t 300 kB\nVmData:\t 7 kB\n", 300 * 1024), ("", 5e8), (None, 5e8)]
)
def test_a_processs_size_is_what_it_holds_in_memory_where_the_system_says_it(monkeypatch, text, found):
    status = SimpleNamespace(exists=lambda: text is not None, read_text=lambda: text)
    monkeypatch.setattr(account, "Path", lambda _: status)
    assert account.base_bytes(use_cpu=True) == found


def test_a_device_has_its_own_memory_or_else_the_machines(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    machine = account.device_bytes(use_cpu=True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    for found, expected in ((7e9, 7e9), (None, machine)):
        monkeypatch.setattr(account, "total_memory", lambda device, found=found: found)
        assert account.device_bytes(use_cpu=False) == expected
        assert account.device_bytes(use_cpu=True) == machine


@pytest.mark.parametrize("lacking", [os.W_OK, os.X_OK])
def test_a_folder_has_to_let_files_be_made_in_it(tmp_path, monkeypatch, lacking):
    monkeypatch.setattr(account.os, "access", lambda path, mode: not mode & lacking)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path};"):
        account.check_writable(tmp_path / "a" / "b" / "c")


def test_weights_of_one_byte_stay_that_where_deepspeed_halves_the_others():
    """30 of one byte, and 3 of four."""
    model = torch.nn.Linear(10, 3)
    model.weight = torch.nn.Parameter(torch.zeros(3, 10, dtype=torch.int8), requires_grad=False)
    assert Sharding(2, 1, half=True).frozen("reward", model).weights == 30 + 3 * 2
    assert Sharding(0, 1).frozen("reward", model).weights == 30 + 3 * 4


@pytest.fixture
def hub(monkeypatch):
    """What is asked of it: an adapter in revision v2 of someone/adapter, on someone/base; no other revision has one."""
    asked, shown = [], GPT2Config(num_labels=1)
    monkeypatch.setattr(account, "resolve_model", lambda name: name)
    there = {("someone/adapter", "v2"): "someone/base"}
    monkeypatch.setattr(account, "adapter_base", lambda path, revision=None: there.get((path, revision)))
    monkeypatch.setattr(
        account.AutoConfig, "from_pretrained", lambda path, **options: asked.append((path, options)) or shown
    )
    return asked, shown


def test_an_adapters_config_is_its_bases_which_has_other_revisions(hub):
    asked, _ = hub
    account.read_config("someone/adapter", revision="v2", trust_remote_code=True)
    assert asked.pop() == ("someone/base", {"revision": "main", "trust_remote_code": True})
    account.reward_config("someone/adapter", revision="v2")  # the head is the adapter's, whatever the base has
    assert asked.pop() == ("someone/base", {"revision": "main", "num_labels": 1, "trust_remote_code": False})
    account.reward_config("someone/adapter", revision="v1")
    assert asked.pop() == ("someone/adapter", {"revision": "v1", "trust_remote_code": False})


def test_another_kind_of_model_is_named_and_the_number_of_its_labels(hub):
    _, shown = hub
    shown.architectures = ["GPT2LMHeadModel", "Another"]
    with pytest.raises(UserError, match=r"^reward model 'one': .* found a GPT2LMHeadModel$"):
        account.reward_config("one")
    shown.architectures = ["GPT2ForSequenceClassification"]
    account.reward_config("one")
    shown.num_labels = 2
    with pytest.raises(UserError, match=r"^reward model 'one': expected a trained head with 1 label, found 2$"):
        account.reward_config("one")


def test_a_config_that_cannot_be_read_is_one_line(hub, monkeypatch):
    def broken(path, **_):
        raise OSError("\nno such model\nhave a look at the hub\n")

    monkeypatch.setattr(account.AutoConfig, "from_pretrained", broken)
    with pytest.raises(UserError, match=r"^model 'one': .* found: no such model$"):
        account.read_config("one")


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
