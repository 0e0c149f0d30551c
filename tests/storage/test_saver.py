"""Checkpoints hold what is trained, are completed while training continues, and may be saved by the clock."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import load_file, save_file
from tiny_ppo import metrics, timeless, trainer
from torch.testing import assert_close
from transformers import TrainerCallback

from rlhf.distributed.trained_weights import frozen_norms, same_norms
from rlhf.errors import UserError
from rlhf.storage import saver as module
from rlhf.storage.checkpoint import checkpoints
from rlhf.storage.disk import fault, write_manifest
from rlhf.storage.saver import wait_to_see

EACH = {"save_strategy": "steps", "save_steps": 1}
GROWN = {"kl_target": 0.05, "lr_scheduler_type": "linear", "optim": "adamw_torch"}


class At(TrainerCallback):
    """Runs a function when a step begins."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, *_, **__):
        if state.global_step + 1 == self.step:
            self.act()


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))  # those that begin with a dot, too


def trained(run):
    return {name: p.detach().clone() for name, p in run.roles.trained.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the latter's embeddings are its head, under two names
def test_adapters_alone_are_in_a_checkpoint_and_go_on_to_the_bit(tmp_path, family):
    whole = trainer(tmp_path / "whole", family=family, lora=True, max_steps=3, **EACH, **GROWN)
    expected = trained(whole)
    whole.train()
    saved = load_file(tmp_path / "whole" / "checkpoints" / "step-2" / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all("lora_" in name or "score.modules_to_save" in name for name in saved)
    again = trainer(tmp_path / "again", family=family, lora=True, max_steps=3, **GROWN)
    again.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoints" / "step-2")
    for name, weights in trained(whole).items():
        assert torch.equal(weights, trained(again)[name]), name
    assert timeless(metrics(tmp_path / "again")[-1]) == timeless(metrics(tmp_path / "whole")[-1])
    # A state_dict requested in between is complete.
    assert len(whole.roles.trained.state_dict()) > len(saved)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run = trainer(folder, family="gpt2", lora=True, max_steps=1, **EACH)
    run.train()
    return run, folder / "checkpoints" / "step-1"


def changed(checkpoint, to, weights=None, facts=None):
    """An intact copy of a checkpoint with other weights or facts."""
    to.mkdir()
    for path in checkpoint.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    if weights is not None:
        save_file(weights, to / "model.safetensors")
    if facts is not None:
        (to / "step.json").write_text(json.dumps(facts))
    write_manifest(to)
    return to


def goes_on(folder, checkpoint, **given):
    run = trainer(folder, family="gpt2", lora=True, max_steps=1, given=given)
    run.train(resume_from_checkpoint=checkpoint)  # which is over then
    return run


def test_a_trained_weight_that_is_missing_is_one_line(saved, tmp_path):
    weights = load_file(saved[1] / "model.safetensors")
    gone = next(name for name in weights if "lora_B" in name)
    fewer = changed(saved[1], tmp_path / "fewer", {name: w for name, w in weights.items() if name != gone})
    with pytest.raises(UserError, match=f"^{fewer}: expected the models .* found others: no {gone}$"):
        goes_on(tmp_path / "a", fewer)
    more = changed(saved[1], tmp_path / "more", weights | {"policy.of.another": torch.ones(1)})
    with pytest.raises(UserError, match=r"found others: unknown policy\.of\.another$"):
        goes_on(tmp_path / "b", more)


def test_an_older_checkpoint_with_all_weights_goes_on(saved, tmp_path):
    run, checkpoint = saved
    facts = json.loads((checkpoint / "step.json").read_text())
    assert facts.pop("frozen").keys() == {n for n, p in run.roles.trained.named_parameters() if not p.requires_grad}
    state = {name: tensor.clone() for name, tensor in run.roles.trained.state_dict().items()}
    del state["policy.base_model.model.lm_head.weight"]  # the embeddings once more, which Accelerate leaves out
    again = goes_on(tmp_path / "a", changed(checkpoint, tmp_path / "all", state, facts))
    for (name, one), other in zip(run.roles.trained.named_parameters(), again.roles.trained.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_adapters_do_not_go_on_upon_other_weights(saved, tmp_path):
    other = tiny.gpt2()
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight[0, 0] += 0.5
    with pytest.raises(UserError) as refused:
        goes_on(tmp_path / "a", saved[1], model=other)
    assert str(refused.value).startswith(f"{saved[1]}: expected the models and the optimizer that it was written with")
    assert str(refused.value).endswith("found others: other weights below what is trained")
    goes_on(tmp_path / "b", saved[1])


def test_norms_tell_weights_apart_and_not_machines():
    model = tiny.llama().requires_grad_(False)
    norms = frozen_norms(model)
    assert norms.keys() == dict(model.named_parameters()).keys()
    assert_close(norms["lm_head.weight"], model.lm_head.weight.norm().item(), rtol=1e-6, atol=0)
    with torch.no_grad():
        model.lm_head.weight *= 1 + 1e-6
        assert same_norms(norms, frozen_norms(model))
        model.lm_head.weight *= 1 + 1e-4
        assert not same_norms(norms, frozen_norms(model))
    assert not same_norms(norms, {name: norm for name, norm in norms.items() if name != "lm_head.weight"})
    assert frozen_norms(model.requires_grad_(True)) == {}


@pytest.fixture
def held(monkeypatch, request):
    """The manifest of one step is written only when the test says so."""
    go, write = threading.Event(), module.write_manifest

    def late(folder):
        assert folder.name != f".step-{request.param}" or go.wait(60)
        write(folder)

    monkeypatch.setattr(module, "write_manifest", late)
    yield go
    go.set()


@pytest.mark.parametrize("held", [1], indirect=True)
def test_a_run_goes_on_while_its_checkpoint_is_made_whole(tmp_path, held):
    seen = []

    def look():
        seen.append((names(tmp_path), [path.name for path in checkpoints(tmp_path)]))
        held.set()

    options = {"max_steps": 3, "save_total_limit": 1} | EACH
    trainer(tmp_path, given={"callbacks": [At(2, look)]}, **options).train()
    assert seen == [([".step-1"], [])]
    assert names(tmp_path) == ["step-3"]
    assert fault(tmp_path / "checkpoints" / "step-3") is None


@pytest.mark.parametrize("held", [2], indirect=True)
def test_the_one_before_stays_until_the_next_is_whole(tmp_path, held):
    seen = []
    look = At(3, lambda: (seen.append(names(tmp_path)), held.set()))
    trainer(tmp_path, given={"callbacks": [look]}, max_steps=3, save_total_limit=1, **EACH).train()
    assert seen == [[".step-2", "step-1"]]
    assert names(tmp_path) == ["step-3"]


def full_after(monkeypatch, calls):
    """From a given step on, writing a manifest fails with a full disk."""
    write, made = module.write_manifest, []

    def fail(folder):
        made.append(folder)
        if len(made) > calls:
            raise OSError(28, "No space left on device")
        write(folder)

    monkeypatch.setattr(module, "write_manifest", fail)


@pytest.mark.parametrize("last", [False, True])
def test_what_goes_wrong_meanwhile_ends_the_run_by_one_line(tmp_path, monkeypatch, last):
    full_after(monkeypatch, 1)
    run = trainer(tmp_path, max_steps=2 if last else 9, **EACH)
    with pytest.raises(UserError) as failed:
        run.train()
    assert str(failed.value).startswith(f"{tmp_path / 'checkpoints' / 'step-2'}: cannot write the checkpoint")
    assert "No space left on device" in str(failed.value)
    assert str(failed.value).endswith("earlier checkpoints are kept: step-1")
    assert names(tmp_path) == ["step-1"]
    assert run.state.global_step <= 3
    assert [thread for thread in threading.enumerate() if "_complete" in thread.name] == []


@pytest.mark.parametrize("held", [1], indirect=True)
def test_what_ends_the_run_is_told_and_the_checkpoint_is_whole(tmp_path, held):
    def fail():
        held.set()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, given={"callbacks": [At(2, fail)]}, max_steps=2, **EACH).train()
    assert names(tmp_path) == ["step-1"]
    assert fault(tmp_path / "checkpoints" / "step-1") is None


def test_whoever_is_told_of_a_checkpoint_finds_it(tmp_path):
    class Look(TrainerCallback):
        def on_save(self, args, state, *_, **__):
            assert fault(tmp_path / "checkpoints" / f"step-{state.global_step}") is None
            seen.append(state.global_step)

    seen = []
    trainer(tmp_path, given={"callbacks": [Look]}, max_steps=2, **EACH).train()
    assert seen == [1, 2]


def test_a_loop_of_ones_own_waits_for_each(tmp_path):
    given = {"train_dataset": None, "reward_model": None, "value_model": tiny.llama_reward()}
    run = trainer(tmp_path, given=given, max_steps=2, **EACH)
    for step in (1, 2):
        run.step(["hello", "you"], [[5, 6], [7]], [1.0, 2.0])
        assert [path.name for path in checkpoints(tmp_path)] == [f"step-{n}" for n in range(1, step + 1)]


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({"save_strategy": "no", "save_minutes": 5}, [2, 4]),
        ({"save_strategy": "no", "save_minutes": 3}, [1, 2, 3, 4, 5]),
        ({"save_strategy": "steps", "save_steps": 3, "save_minutes": 5}, [2, 3, 5]),  # each begins the time anew
        ({"save_strategy": "no"}, []),
    ],
)
def test_checkpoints_by_the_clock(tmp_path, monkeypatch, options, saved):
    """Pretend that each step takes three minutes."""
    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def later():
        clock[0] += 180

    ticks = [At(step, later) for step in range(1, 6)]
    trainer(tmp_path, given={"callbacks": ticks}, max_steps=5, num_ppo_epochs=1, **options).train()
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step}" for step in saved]


def test_the_time_counts_from_the_beginning_of_training(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    saver = module.Saver(Accelerator(cpu=True), tmp_path, torch.nn.Linear(2, 1))
    clock[0] = 100.0
    with saver:
        clock[0] = 159.9
        assert not saver.is_due(1)
        clock[0] = 160.0
        assert saver.is_due(1)
        saver.write(1, None, {}, lambda _: None)
        clock[0] = 219.9
        assert not saver.is_due(1)  # since the last checkpoint


def test_the_optimizer_is_read_in_main_memory(saved, tmp_path, monkeypatch):
    """Also if Accelerate would read it on each of several GPUs, next to the states themselves."""
    places = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **o: (places.append(str(o.get("map_location"))), load(*a, **o))[1])
    run = trainer(tmp_path, family="gpt2", lora=True, max_steps=1)
    monkeypatch.setattr(Accelerator, "multi_device", property(lambda _: True))
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 2))
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))
    run.resume(saved[1])
    assert "cpu" in places
    assert "meta" not in places


def test_files_of_other_machines_are_waited_for(tmp_path):
    late = threading.Timer(0.3, lambda: (tmp_path / "b").write_text("x"))
    (tmp_path / "a").write_text("x")
    late.start()
    wait_to_see(tmp_path, ["a", "b"], within=30)
    assert (tmp_path / "b").is_file()
    with pytest.raises(OSError, match="no c, which another process has written"):
        wait_to_see(tmp_path, ["a", "c"], within=0.1)


def test_a_second_save_of_a_step_takes_the_place_of_the_first(tmp_path):
    model = torch.nn.Linear(2, 1)
    accelerator = Accelerator(cpu=True)
    saver = module.Saver(accelerator, tmp_path, model)
    for text in ("first", "second"):
        saver.write(3, None, {}, lambda folder, text=text: (folder / "more").write_text(text), wait=True)
    (one,) = checkpoints(tmp_path)
    assert names(tmp_path) == ["step-3"]
    assert (one / "more").read_text() == "second"
    assert fault(one) is None


def test_one_that_failed_leaves_nothing_and_the_next_one_is_written(tmp_path, monkeypatch):
    saver = module.Saver(Accelerator(cpu=True), tmp_path, torch.nn.Linear(2, 1))

    def torn(_):
        raise RuntimeError("file write failed")

    with pytest.raises(UserError, match="step-1: cannot write the checkpoint: file write failed "):
        saver.write(1, None, {}, torn)
    assert names(tmp_path) == []
    with monkeypatch.context() as patch:
        full_after(patch, 0)
        with pytest.raises(UserError, match="step-1: cannot write the checkpoint: No space"):
            saver.write(1, None, {}, lambda _: None)
    assert names(tmp_path) == []
    (tmp_path / "checkpoints" / ".step-7").mkdir()  # of a run that was killed
    seen = []
    monkeypatch.setattr(module, "wait_to_see", lambda folder, files: seen.append(files))
    for step in (1, 2, 3):
        saver.write(step, 1, {}, lambda folder: (folder / "more").write_text(""), best="step-1")
    assert names(tmp_path) == ["step-1", "step-3"]
    assert seen[0] == {path.name for path in (tmp_path / "checkpoints" / "step-3").iterdir()} - {"manifest.json"}


def test_what_failed_in_a_run_that_ended_is_not_told_by_the_next_one(tmp_path, monkeypatch):
    saver = module.Saver(Accelerator(cpu=True), tmp_path, torch.nn.Linear(2, 1))
    written = threading.Event()  # the failure comes after `write` has asked for one

    def fail(folder):
        written.wait(60)
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_manifest", fail)
        saver.__enter__()
        saver.write(1, None, {}, lambda _: None)
        written.set()
        error = ZeroDivisionError()
        saver.__exit__(type(error), error, None)
    with saver:
        saver.write(2, None, {}, lambda _: None)
    assert names(tmp_path) == ["step-2"]


def test_after_the_run_a_checkpoint_is_waited_for(tmp_path, monkeypatch):
    write, flushed = module.write_manifest, []
    monkeypatch.setattr(module, "write_manifest", lambda folder: (time.sleep(0.2), write(folder)))
    monkeypatch.setattr(module, "flush", lambda folder: flushed.append((folder.name, names(tmp_path))))
    saver = module.Saver(Accelerator(cpu=True), tmp_path, torch.nn.Linear(2, 1))
    with saver:
        pass
    saver.write(1, None, {}, lambda _: None)
    assert names(tmp_path) == ["step-1"]
    assert flushed == [("checkpoints", ["step-1"])]  # after the rename
