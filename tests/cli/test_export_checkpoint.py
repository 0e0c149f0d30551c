"""rlhf export saves a checkpoint's policy as the stage would have saved it at that step."""

import json

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_recipe import recipe
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf.cli import export, train_ppo
from rlhf.cli.export import check_output, chosen, settings, stage_facts
from rlhf.config import ExportConfig
from rlhf.errors import UserError
from rlhf.storage.basis import model_digest
from rlhf.storage.disk import write_manifest

PPO = {"save_strategy": "steps", "save_steps": 1, "report_to": "none", "max_steps": 2, "lr_scheduler_type": "constant"}


def call(main, monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["script", *map(str, argv)])
    main()


def logits(folder, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    return model.eval()(torch.arange(8)[None]).logits


@pytest.mark.parametrize("stage", ["ppo_full", "ppo_lora"])
def test_a_checkpoint_becomes_the_model_that_it_was(tmp_path, monkeypatch, stage):
    for name in ("log_to", "drop"):
        monkeypatch.setattr(f"rlhf.console.quiet.{name}", lambda *_: None)
    reward = tmp_path / "reward"
    tiny.gpt2_reward().save_pretrained(reward)
    tiny.gpt2_tokenizer().save_pretrained(reward)
    options = PPO | {"reward_model_path": str(reward), "learning_rate": 1e-2}
    recipes = recipe(tmp_path / "recipe", **{stage: options})
    where = ["--run", "t", "--runs_dir", tmp_path / "runs", "--stage", stage]
    call(train_ppo.main, monkeypatch, "--config", recipes / f"{stage}.yaml", *where[:-2])
    folder = tmp_path / "runs" / "t" / stage
    before = {path.name: path.read_bytes() for path in folder.glob("*.json*")}
    first, second = tmp_path / "first", tmp_path / "second"
    call(export.main, monkeypatch, *where, "--checkpoint", "step-1", "--output", first)
    call(export.main, monkeypatch, "--checkpoint", folder / "checkpoints" / "step-2", "--output", second)
    assert (logits(second) == logits(folder)).all()
    assert (logits(first) - logits(folder)).abs().max() > 1e-3
    if stage == "ppo_lora":
        assert_close(logits(recipes / "base", first / "adapter"), logits(first))
    else:  # as they lie in the checkpoint
        step = folder / "checkpoints" / "step-1"
        saved, written = (load_file(place / "model.safetensors") for place in (first, step))
        assert {f"policy.{name}" for name in saved} == {name for name in written if name.startswith("policy.")}
        assert all((written[f"policy.{name}"] == tensor).all() for name, tensor in saved.items())
    assert f"`{stage}`" in (first / "README.md").read_text()
    assert (first / "tokenizer.json").exists()
    assert {path.name: path.read_bytes() for path in folder.glob("*.json*")} == before

    with pytest.raises(UserError, match=r"checkpoint: expected one of those in .*, step-1, step-2, found step-3"):
        call(export.main, monkeypatch, *where, "--checkpoint", "step-3", "--output", tmp_path / "third")
    for output, found in ((first, "a new or an empty folder"), (folder / "best", "a folder outside of the stage's")):
        with pytest.raises(UserError, match=f"output: expected {found}"):
            call(export.main, monkeypatch, *where, "--output", output)
    base = recipes / "base" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(base).items()}, base, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"expected the model that {stage} was trained from, found other content"):
        call(export.main, monkeypatch, *where, "--output", tmp_path / "third")


def checkpoint(stage, name):
    made = stage / "checkpoints" / name
    made.mkdir(parents=True)
    facts = {"step": int(name.removeprefix("step-")), "batch_size": 1, "engine": "NO", "processes": 1}
    (made / "step.json").write_text(json.dumps(facts))
    write_manifest(made)
    return made


def test_the_newest_checkpoint_or_the_one_that_is_named(tmp_path, monkeypatch):
    stage, other = tmp_path / "run" / "ppo_lora", tmp_path / "other" / "ppo_full"
    for number in (9, 10):
        checkpoint(stage, f"step-{number}")
    theirs = checkpoint(other, "step-1")
    monkeypatch.chdir(tmp_path)

    def found(name, stage="ppo_lora"):
        return chosen(tmp_path / "run", ExportConfig(stage=stage, checkpoint=name))

    assert found(None) == stage / "checkpoints" / "step-10"
    assert found("step-9") == stage / "checkpoints" / "step-9"
    assert found("other/ppo_full/checkpoints/step-1") == found(str(theirs)) == theirs
    with pytest.raises(UserError, match=r"step-9, step-10, found step-90; did you mean 'step-9'\?"):
        found("step-90")
    with pytest.raises(UserError, match=r"run/ppo_full, none, found none$"):
        found(None, "ppo_full")
    with pytest.raises(UserError, match="other/ppo_full, step-1, found step-2"):
        found("other/ppo_full/checkpoints/step-2")
    (stage / "checkpoints" / "step-10" / "step.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-10: broken checkpoint, found step\.json of 2 bytes"):
        found(None)


def test_where_a_model_may_be_written(tmp_path):
    stage = tmp_path / "run" / "ppo_full"
    stage.mkdir(parents=True)
    for inside in (stage, stage / "model", stage / ".." / "ppo_full" / "a" / "b"):
        with pytest.raises(UserError, match="output: expected a folder outside of the stage's"):
            check_output(inside, stage)
    check_output(tmp_path / "run" / "new" / "model", stage)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", stage)
    (tmp_path / "empty" / ".hidden").write_text("")
    (tmp_path / "file").write_text("")
    for taken in (tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(UserError, match=f"output: expected a new or an empty folder, found {taken} with content"):
            check_output(taken, stage)


def test_the_model_that_a_stage_began_with_is_the_one_that_is_there(tmp_path):
    base, stage = tmp_path / "base", tmp_path / "run" / "ppo_full"
    for folder in (base, stage):
        folder.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    with pytest.raises(UserError, match="expected a PPO stage that has begun, found: not run"):
        stage_facts(stage)

    def begun(**facts):
        (stage / "run.json").write_text(json.dumps({"config": {"model_name_or_path": str(base)}} | facts))

    begun()  # of an earlier version
    assert stage_facts(stage)["config"] == {"model_name_or_path": str(base)}
    parts = {"given": {}, "flags": {}, "stages": {}}
    begun(basis=parts | {"data": {str(base): model_digest(str(base))}})
    stage_facts(stage)
    (base / "config.json").write_text("[]")
    with pytest.raises(UserError, match=f"^{base}: expected the model that ppo_full .*, found other content$"):
        stage_facts(stage)
    (base / "config.json").unlink()
    with pytest.raises(UserError, match=r"found none$"):
        stage_facts(stage)


def test_the_settings_that_make_a_policy_are_the_stages():
    found = settings({"model_name_or_path": "x", "lora_r": 3, "use_peft": True, "learning_rate": 1.0, "seed": 2})
    assert (found.model_name_or_path, found.lora_r, found.use_peft) == ("x", 3, True)
