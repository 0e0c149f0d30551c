"""train_ppo.py evaluates on prompts of its own training set, taken out of it."""

import json
from types import SimpleNamespace

import pytest
import yaml
from test_model_options import answer, run_folder  # noqa: F401
from trl import ModelConfig

from rlhf.cli import train_ppo
from rlhf.cli.train_ppo import assumed_reward, cost, hold_out, main, reward_model
from rlhf.config import PPOStageConfig
from rlhf.data.oasst import TextPrompt
from rlhf.errors import UserError


def test_no_tree_is_in_both_and_nothing_is_taken_out_unasked():
    prompts = [TextPrompt(f"p{i}", f"tree {i // 2}", f"text {i}") for i in range(12)]
    options = {"output_dir": "unused", "use_cpu": True, "bf16": False, "eval_prompts": 3}
    train, unseen = hold_out(prompts, PPOStageConfig(**options, eval_strategy="epoch"), 0)
    assert len(unseen) == 3
    assert len(train) == 8  # of the second tree taken out, one prompt is in neither
    assert not {p.tree_id for p in train} & {p.tree_id for p in unseen}
    assert hold_out(prompts, PPOStageConfig(**options), 0) == (prompts, [])
    assert len(hold_out(prompts, PPOStageConfig(**options, eval_on_start=True), 0)[1]) == 3
    assert hold_out(prompts, PPOStageConfig(**options, eval_on_start=True), 0)[1] == unseen
    assert hold_out(prompts, PPOStageConfig(**options, eval_on_start=True), 1)[1] != unseen


def test_an_eval_strategy_is_followed(run_folder, monkeypatch, capsys):  # noqa: F811
    argv = ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_prompts", "3"]
    code, said, errors = answer(main, monkeypatch, capsys, "--config", run_folder / "ppo.yaml", *argv)
    assert (code, errors) == (0, []), said
    assert "split_train 7, " in said
    assert "split_train_held_out 3" in said
    folder = run_folder / "runs" / "tiny" / "ppo_full"
    rows = [json.loads(line) for line in (folder / "eval_metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    facts = json.loads((folder / "run.json").read_text())
    assert facts["data"]["prompts"]["split_train"] == 7
    assert len(facts["train_tree_ids"]) == 10  # the evaluation must not ask those held out, either


def test_too_few_prompts_to_take_some_out(run_folder, monkeypatch, capsys):  # noqa: F811
    recipe = run_folder / "ppo.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"train_prompts": 2}))
    code, _, errors = answer(main, monkeypatch, capsys, "--config", recipe, "--eval_on_start", "true")
    assert code == 2
    assert errors[0].startswith(
        "error: not enough training prompts for eval_prompts and train: expected eval_prompts 16"
    )


def test_what_scores_is_the_runs_reward_model_unless_another_or_functions_are_given(tmp_path):
    with pytest.raises(UserError, match="expected a stage that is done, found: not run"):
        reward_model(tmp_path, None, [])
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "run.json").write_text(json.dumps({"status": "done", "id": "7"}))
    assert reward_model(tmp_path, None, []) == (str(tmp_path / "reward"), {"reward": "7"})
    assert reward_model(tmp_path, "other", []) == ("other", {})
    assert reward_model(tmp_path, None, ["a:b"]) == (None, {})  # functions alone
    assert reward_model(tmp_path, "other", ["a:b"]) == ("other", {})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, "base"),
        ({"dry_run": False}, None),
        ({"reward_model_path": "other"}, None),
        ({"rewards": ["a:b"]}, None),
    ],
)
def test_a_dry_run_assumes_a_reward_model_only_where_one_will_be_trained(tmp_path, capsys, changes, found):
    args = SimpleNamespace(**{"dry_run": True, "reward_model_path": None, "rewards": []} | changes)
    said = "reward model: not trained yet; assumed to be as large as base\n"
    assert assumed_reward(tmp_path, args, "base") == found
    assert capsys.readouterr().out == (said if found else "")
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "run.json").write_text(json.dumps({"status": "done"}))
    assert assumed_reward(tmp_path, args, "base") is None


def test_where_the_time_went_is_said_in_order(monkeypatch):
    work = {name: SimpleNamespace(seconds=x) for name, x in (("score", 1.0), ("generate", 6.0), ("learn", 13.0))}
    monkeypatch.setattr(train_ppo, "total", lambda work: work)
    monkeypatch.setattr(train_ppo, "peak_memory", lambda device: 2_340_000_000)
    trainer = SimpleNamespace(work=work, accelerator=SimpleNamespace(device="cpu"))
    assert cost(trainer) == "peak 2.3 GB · learn 65 %, sample 30 %, score 5 %"


@pytest.mark.parametrize(
    ("own", "given", "counted"),
    [
        ("float16", "auto", "float16"),
        ("float16", "bfloat16", "bfloat16"),
        ("float16", None, "float32"),
        (None, "auto", "float32"),
    ],
)
def test_a_dry_run_counts_memory_for_the_dtype_that_is_loaded(monkeypatch, own, given, counted):
    seen = []
    monkeypatch.setattr(train_ppo, "read_config", lambda name, **_: SimpleNamespace(dtype=own))
    monkeypatch.setattr(train_ppo, "reward_config", lambda name, **_: name)
    monkeypatch.setattr(train_ppo, "check_attention", lambda *given: None)
    monkeypatch.setattr(train_ppo, "dry_run", lambda *given: seen.append(given[2:5]))
    args = SimpleNamespace(trust_remote_code=False)
    train_ppo.estimate(args, ModelConfig(dtype=given), ("base", "judge"), [3, 4])
    assert seen == [("judge", [3, 4], counted)]


@pytest.fixture
def built(monkeypatch):
    """What `build` passes on to the trainer, with names in place of models."""

    def build(names=("base", "judge"), sharded=False, critic="separate", trusted=False, **settings):
        def loaded(kind):
            return lambda name, **options: (kind, name, options)

        monkeypatch.setattr(train_ppo, "PPOTrainer", lambda **given: given)
        monkeypatch.setattr(train_ppo, "is_deepspeed_zero3_enabled", lambda: sharded)
        for kind in ("load_causal_lm", "load_reward_model", "saved_tokenizer"):
            monkeypatch.setattr(train_ppo, kind, loaded(kind.split("_")[1]))
        args = SimpleNamespace(critic=critic, trust_remote_code=trusted)
        prompts = [TextPrompt(f"p{i}", f"tree {i}", f"text {i}") for i in range(3)]
        model_args = ModelConfig(**settings)
        return train_ppo.build(args, model_args, names, [len], "tokenizer", prompts[:2], prompts[2:])

    return build


def test_the_trainer_gets_each_model_in_its_place(built):
    given = built(trusted=True, model_revision="v2", dtype="bfloat16")
    kind, name, options = given["model"]
    assert (kind, name, options["revision"], options["trust_remote_code"]) == ("causal", "base", "v2", True)
    assert options["keep_adapter"] is False
    judge, function = given["reward_model"]
    assert (judge[:2], function) == (("reward", "judge"), len)
    assert "revision" not in judge[2]  # it comes from another place
    assert judge[2]["dtype"] == options["dtype"]
    assert given["reward_processing_classes"] == ("tokenizer", "judge", {"trust_remote_code": True})
    assert [row["prompt_id"] for row in given["train_dataset"]] == ["p0", "p1"]
    assert [row["prompt_id"] for row in given["eval_dataset"]] == ["p2"]
    assert given["ref_model"] is given["value_model"] is given["peft_config"] is None


def test_without_a_reward_model_functions_score_alone(built):
    given = built(names=("base", None))
    assert given["reward_model"] == [len]
    assert given["reward_processing_classes"] is given["value_model"] is None


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({}, ("base", "judge")),
        ({"critic": "shared"}, ("base", None)),
        ({"names": ("base", None)}, ("base", None)),
        ({"use_peft": True}, (None, None)),  # the policy without its adapters is the reference
    ],
)
def test_where_weights_are_sharded_as_they_load_each_role_has_its_own(built, options, own):
    given = built(sharded=True, **options)
    roles = (given["ref_model"], given["value_model"])
    assert tuple(role and role[1] for role in roles) == own
    assert given["model"][2]["keep_adapter"] is options.get("use_peft", False)
    if own[0]:
        assert given["ref_model"][0] == "causal"
        assert "keep_adapter" not in given["ref_model"][2]
