"""A run goes on from a checkpoint with what it was written with, or one line says what differs."""

import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig
from tiny_ppo import PROMPTS, metrics, trainer

from rlhf.errors import UserError
from rlhf.ppo import checkpointing
from rlhf.ppo.prompts import Prompt
from rlhf.storage.disk import write_manifest

OPTIONS = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, lora=True, **OPTIONS).train()
    return folder / "checkpoints" / "step-1"


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "step-1")


def refusal(folder, checkpoint, given=None, **options):
    """What a run says that is to go on from the checkpoint: one line."""
    settings = {"lora": True, "max_steps": 2} | options
    with pytest.raises(UserError) as refused:
        trainer(folder, given=given, **settings).train(resume_from_checkpoint=checkpoint)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_another_adapter_is_one_line(tmp_path, checkpoint):
    wider = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    said = refusal(tmp_path / "new", checkpoint, given={"peft_config": wider})
    assert said.startswith(f"{checkpoint}: expected the models and the optimizer that it was written with (")
    assert "lora_r" in said
    assert "size mismatch" in said


def test_no_adapter_is_one_line(tmp_path, checkpoint):
    said = refusal(tmp_path / "new", checkpoint, lora=False)
    assert said.startswith(f"{checkpoint}: expected the models and the optimizer that it was written with (")


@pytest.mark.parametrize("name", ["warnings", "skipped_in_a_row", "episode"])
def test_a_step_json_without_a_fact_names_it(tmp_path, checkpoint, name):
    path = checkpoint / "step.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))
    write_manifest(checkpoint)
    assert refusal(tmp_path / "new", checkpoint) == f"{path}: expected what a PPO run writes there, found no '{name}'"


@pytest.mark.parametrize("warnings", [None, [], {}, {"kls": 1}])
def test_warnings_that_are_none_are_named(tmp_path, checkpoint, warnings):
    path = checkpoint / "step.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": warnings}))
    write_manifest(checkpoint)
    assert refusal(tmp_path / "new", checkpoint).startswith(f"{path}: expected what a PPO run writes there, found ")


@pytest.mark.parametrize("content", [None, "", "[]", '{"no": 1}'])
def test_a_state_of_callbacks_that_is_none_is_named(tmp_path, checkpoint, content):
    path = checkpoint / "trainer_state.json"
    path.unlink() if content is None else path.write_text(content)
    write_manifest(checkpoint)
    assert refusal(tmp_path / "new", checkpoint).startswith(f"{path}: expected what a PPO run writes there, found ")


WORDS = [{"prompt": [{"role": "user", "content": f"other words {i}"}]} for i in range(7)]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rows": WORDS}, "with train_dataset 7 prompts "),  # the same ids, which are the numbers of the rows
        ({"rows": PROMPTS[::-1]}, "with train_dataset 7 prompts "),
        ({"rows": [row | {"prompt_id": f"p{i}"} for i, row in enumerate(PROMPTS)]}, "with train_dataset 7 prompts "),
        ({"seed": 6}, "with seed 5, but this run has 6"),
        ({"data_seed": 6}, "with data_seed 5, but this run has 6"),
        ({"seed": 6, "data_seed": 5}, "with seed 5, but this run has 6"),
    ],
)
def test_other_data_in_another_order_are_refused(tmp_path, checkpoint, changes, name):
    assert refusal(tmp_path / "new", checkpoint, **changes).startswith(f"{checkpoint}: written {name}")


def test_another_optimizer_or_scaling_is_refused(tmp_path, checkpoint):
    for changes, words in (
        ({"optim": "adafactor"}, "with optim AdamW, but this run has Adafactor"),
        ({"score_norm_samples": 4}, "with score_norm_samples 0"),
    ):
        assert refusal(tmp_path / "new", checkpoint, **changes).startswith(f"{checkpoint}: written {words}")


def groups(run):
    names = ("lr", "initial_lr", "weight_decay", "betas", "eps")
    return [{name: group[name] for name in names} for group in run.optimizer.param_groups]


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-5},
        {"critic_learning_rate": 2e-5, "lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"weight_decay": 0.3, "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
        {"kl_coef": 0.5},
        {"kl_coef": 0.5, "kl_target": 0.01},
        {"max_steps": 6, "lr_scheduler_type": "linear"},
        {"num_train_epochs": 4, "max_steps": -1, "lr_scheduler_type": "linear"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_other_settings_count_from_the_next_step_on(tmp_path, checkpoint, changes):
    """As in a run that has always had them, while moments are those of the checkpoint."""
    run = trainer(tmp_path / "on", lora=True, **{"max_steps": 3} | changes)
    assert run.resume(checkpoint) == 1
    same = trainer(tmp_path / "always", lora=True, **{"max_steps": 3} | changes)
    same.optimizer.step()
    same.scheduler.step()
    assert groups(run) == groups(same)
    assert run.scheduler.get_last_lr() == same.scheduler.get_last_lr()
    assert run.kl_control.kl_coef == changes.get("kl_coef", 0.05)
    assert all(state["step"] > 0 for state in run.optimizer.state.values())
    assert run.optimizer.state
    for _ in range(2):
        run.scheduler.step()
        same.scheduler.step()
        assert run.scheduler.get_last_lr() == same.scheduler.get_last_lr()


def test_an_adaptive_coefficient_goes_on_where_it_was(tmp_path):
    options = {"kl_target": 1e-6, "kl_horizon": 10, "lora": True, "max_steps": 1} | {
        "save_strategy": "steps",
        "save_steps": 1,
    }
    first = trainer(tmp_path, **options)
    first.train()
    run = trainer(tmp_path, **options | {"max_steps": 2})
    run.resume()
    assert run.kl_control.kl_coef == first.kl_control.kl_coef != 0.05


def test_more_steps_go_on_along_the_longer_schedule(tmp_path):
    options = {"lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, max_steps=3, **options).train()
    trainer(tmp_path, max_steps=6, **options).train(resume_from_checkpoint=True)
    found = [row["lr"] for row in metrics(tmp_path)]
    assert found == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3, 5e-4, 1e-3 / 3, 1e-3 / 6])


def test_a_schedule_of_ones_own_goes_on_as_it_was(tmp_path):
    def own():
        optimizer = torch.optim.SGD(tiny_policy.parameters(), lr=0.5, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

    tiny_policy = tiny.llama()
    options = {"critic": "shared", "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, given={"model": tiny_policy, "optimizers": own()}, **options).train()
    tiny_policy = tiny.llama()
    run = trainer(tmp_path, given={"model": tiny_policy, "optimizers": own()}, **options | {"max_steps": 3})
    run.resume()
    assert run.scheduler.get_last_lr() == [pytest.approx(0.05)] == [run.optimizer.param_groups[0]["lr"]]


def test_more_steps_and_the_seed_by_its_other_name_are_no_other_data(tmp_path, checkpoint):
    run = trainer(tmp_path / "new", lora=True, max_steps=2, data_seed=5)
    run.train(resume_from_checkpoint=checkpoint)
    assert run.state.global_step == 2
    assert run.episode == 7  # 4 and 3: every prompt once


def test_too_little_memory_is_no_fault_of_a_checkpoint(tmp_path, monkeypatch):
    for error, found in ((torch.OutOfMemoryError(), torch.OutOfMemoryError), (KeyError("x"), UserError)):

        def load_state(*_, error=error, **options):
            assert options == {"map_location": "cpu"}
            raise error

        monkeypatch.setattr(checkpointing, "load_state", load_state)
        with pytest.raises(found):
            checkpointing._load_state(None, tmp_path, map_location="cpu")


def test_a_checkpoint_is_of_its_prompts_their_names_and_their_order():
    one, other = (Prompt(name, [5, 6], "", {}, name) for name in "ab")
    same = Prompt("a", [5, 6], "said otherwise", {"column": 1}, "c")
    assert checkpointing.digest([one, other]) == checkpointing.digest([same, other])
    rows = ([one, other], [other, one], [one, one], [one], [Prompt("a", [5], "", {}, "a"), other])
    assert len({checkpointing.digest(row) for row in rows}) == 5
    assert checkpointing.digest([one, other]).startswith("2 prompts ")
