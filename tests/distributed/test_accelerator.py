"""What Accelerate, DeepSpeed and the random streams are given of the training arguments."""

from types import SimpleNamespace

import pytest
import torch

from rlhf.distributed import accelerator as module


@pytest.fixture
def calls(monkeypatch):
    """What `make_accelerator` calls, by name, with the values it gives; `calls["deepspeed"]` chooses the engine."""
    seen = {"deepspeed": False}

    def note(name):
        return lambda *given, **named: seen.__setitem__(name, (*given, named) if named else given)

    def made(**options):
        seen["made"] = options
        return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin="plugin"))

    monkeypatch.setattr(module, "Accelerator", made)
    for name in ("check_engine", "configure_fsdp", "configure_deepspeed", "prepare_offload"):
        monkeypatch.setattr(module, name, note(name))
    monkeypatch.setattr(module, "set_seed", note("seed"))
    monkeypatch.setattr(module, "enable_full_determinism", note("determinism"))
    monkeypatch.setattr(module.logging, "set_verbosity", note("verbosity"))
    monkeypatch.setattr(module, "is_deepspeed", lambda accelerator: seen["deepspeed"])
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.setattr(module, "wants_deepspeed", lambda: seen["deepspeed"])
    return seen


def args(**changed):
    ddp = {
        "ddp_find_unused_parameters": None,
        "ddp_bucket_cap_mb": None,
        "ddp_broadcast_buffers": None,
        "ddp_static_graph": None,
    }
    given = {
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "report_to": [],
        "output_dir": "out",
        "optim": "adamw_torch",
    }
    given |= {"gradient_accumulation_steps": 4, "full_determinism": False, "seed": 7, **ddp}
    return SimpleNamespace(**given | changed, get_process_log_level=lambda: 30)


@pytest.mark.parametrize("fsdp", [False, True])
def test_gradients_are_sharded_after_each_micro_batch_under_fsdp_alone(calls, monkeypatch, fsdp):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(fsdp).lower())
    module.make_accelerator(args())
    plugin = calls["made"]["gradient_accumulation_plugin"]
    assert (plugin.sync_each_batch, plugin.num_steps) == (fsdp, 1)
    assert "configure_fsdp" in calls
    assert "check_engine" in calls


@pytest.mark.parametrize(
    ("changed", "precision"), [({}, "no"), ({"bf16": True}, "bf16"), ({"fp16": True}, "fp16")], ids=str
)
def test_the_precision_the_trackers_and_the_device_are_the_arguments(calls, changed, precision):
    module.make_accelerator(args(**changed))
    made = calls["made"]
    assert (made["mixed_precision"], made["cpu"], made["log_with"]) == (precision, True, None)
    assert made["project_config"].project_dir == "out"
    assert made["kwargs_handlers"] is None
    module.make_accelerator(args(use_cpu=False, report_to=["tensorboard"]))
    assert (calls["made"]["cpu"], calls["made"]["log_with"]) == (False, ["tensorboard"])
    assert calls["verbosity"] == (30,)
    assert calls["seed"] == (7,)
    assert "determinism" not in calls
    assert "configure_deepspeed" not in calls
    assert "prepare_offload" not in calls


def test_deepspeed_is_given_the_arguments_and_one_step_and_is_not_turned_off_on_cpus(calls):
    calls["deepspeed"] = True
    given = args(full_determinism=True)
    module.make_accelerator(given)
    assert calls["made"]["cpu"] is False
    assert calls["configure_deepspeed"] == ("plugin", given, {"counted": 1})
    assert calls["prepare_offload"] == ("plugin", "adamw_torch")
    assert calls["determinism"] == (7,)
    assert "seed" not in calls


def test_each_option_of_ddp_is_its_own(calls):
    one = {"ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 9, "ddp_broadcast_buffers": True}
    module.make_accelerator(args(**one, ddp_static_graph=False))
    [handler] = calls["made"]["kwargs_handlers"]
    assert (handler.find_unused_parameters, handler.bucket_cap_mb) == (False, 9)
    assert (handler.broadcast_buffers, handler.static_graph) == (True, False)
    module.make_accelerator(args(ddp_static_graph=True))  # the others keep their defaults
    [handler] = calls["made"]["kwargs_handlers"]
    assert (handler.static_graph, handler.bucket_cap_mb, handler.broadcast_buffers) == (True, 25, True)


def test_only_an_accelerators_cache_is_emptied(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: emptied.append(1))
    module.clear_cache(torch.device("cpu"))
    assert not emptied
    module.clear_cache(torch.device("cuda", 0))
    assert emptied
