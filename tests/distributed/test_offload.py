"""Optimizers under offload: DeepSpeed's own for the CPU are compiled once; others are refused by one line."""

from types import SimpleNamespace

import pytest
import torch

from rlhf.cli import prepare
from rlhf.distributed.offload import check_given_optimizer, compile_cpu_optimizer, prepare_offload, replaces_optimizer
from rlhf.errors import UserError


def plugin(device="cpu", **more):
    return SimpleNamespace(deepspeed_config={"zero_optimization": {"offload_optimizer": {"device": device}}} | more)


@pytest.fixture
def builds(monkeypatch, tmp_path):
    """Names of the optimizers that would be compiled; set `builds.error` to make compiling fail."""
    from deepspeed.ops import op_builder

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    found = SimpleNamespace(names=[], error=None)

    class Builder:
        def load(self):
            found.names.append(type(self).__name__)
            if found.error:
                raise found.error

    for name in ("CPUAdamBuilder", "CPUAdagradBuilder"):
        monkeypatch.setattr(op_builder, name, type(name, (Builder,), {}))
    return found


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_states_on_any_other_device_are_offloaded(builds, device):
    assert replaces_optimizer(plugin(device))
    prepare_offload(plugin(device), "adamw_torch")
    assert builds.names == ["CPUAdamBuilder"]


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "sgd", "adafactor", "lion_8bit", "adamw_torch_8bit"])
def test_an_optimizer_that_would_become_adam_is_refused(builds, optim):
    words = f"^optim: expected one of adamw_torch, .* with offloaded optimizer states, found {optim}$"
    with pytest.raises(UserError, match=words):
        prepare_offload(plugin(), optim)
    assert builds.names == []


@pytest.mark.parametrize(
    "given",
    [None, plugin("none"), plugin(None), plugin(zero_optimization=None), plugin(zero_force_ds_cpu_optimizer=False)],
)
def test_without_offload_every_optimizer_is_what_it_is(builds, given):
    prepare_offload(given, "adamw_bnb_8bit")
    check_given_optimizer(given, torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1))
    assert builds.names == []


def test_an_optimizer_of_ones_own_is_looked_at_too():
    weights = [torch.zeros(1, requires_grad=True)]
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.Adagrad):
        check_given_optimizer(plugin(), kind(weights, 0.1))
    with pytest.raises(UserError, match=r"^optimizers: expected Adam, AdamW or Adagrad .*, found SGD$"):
        check_given_optimizer(plugin(), torch.optim.SGD(weights, 0.1))


def test_it_is_compiled_before_training(builds):
    prepare_offload(plugin(), "adamw_torch")
    prepare_offload(plugin(), "adagrad")
    assert builds.names == ["CPUAdamBuilder", "CPUAdagradBuilder"]


def test_what_cannot_be_compiled_is_one_line(builds):
    builds.error = RuntimeError("\nno compiler: c++\nmore\nlines")
    expected = r"^offload: DeepSpeed's Adam for the CPU did not compile; .*: no compiler: c\+\+$"
    for call in (lambda: prepare_offload(plugin(), "adamw_torch"), compile_cpu_optimizer):
        with pytest.raises(UserError, match=expected):
            call()


def test_prepare_compiles_it_where_the_engine_is_named(builds, monkeypatch, tmp_path):
    (tmp_path / "reward.yaml").write_text("max_length: 8\n")
    monkeypatch.setattr(prepare, "load_pairs", lambda *where: ([], {"kept": 0, "rows": 0}))
    for engine, expected in ((None, []), ("zero3", []), ("zero3_offload", ["CPUAdamBuilder"])):
        builds.names.clear()
        flags = [] if engine is None else ["--engine", engine]
        monkeypatch.setattr("sys.argv", ["prepare", "--recipe", str(tmp_path), *flags])
        prepare.main()
        assert builds.names == expected
    monkeypatch.setattr("sys.argv", ["prepare", "--engine", "zero4"])
    with pytest.raises(UserError, match=r"^engine: expected one of cpu, .*, found 'zero4'; did you mean 'zero3'\?$"):
        prepare.main()
