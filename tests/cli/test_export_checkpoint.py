"""rlhf export saves a checkpoint's policy as the stage would have saved it at that step."""

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_recipe import recipe
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf.cli import export, train_ppo
from rlhf.errors import UserError

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
