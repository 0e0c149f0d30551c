"""train_ppo.py evaluates on prompts of its own training set, taken out of it."""

import json

import yaml
from test_model_options import answer, run_folder  # noqa: F401

from rlhf.cli.train_ppo import hold_out, main
from rlhf.config import PPOStageConfig
from rlhf.data.oasst import TextPrompt


def test_no_tree_is_in_both_and_nothing_is_taken_out_unasked():
    prompts = [TextPrompt(f"p{i}", f"tree {i // 2}", f"text {i}") for i in range(12)]
    options = {"output_dir": "unused", "use_cpu": True, "bf16": False, "eval_prompts": 3}
    train, unseen = hold_out(prompts, PPOStageConfig(**options, eval_strategy="epoch"), 0)
    assert len(unseen) == 3
    assert len(train) == 8  # of the second tree taken out, one prompt is in neither
    assert not {p.tree_id for p in train} & {p.tree_id for p in unseen}
    assert hold_out(prompts, PPOStageConfig(**options), 0) == (prompts, [])


def test_an_eval_strategy_is_followed(run_folder, monkeypatch, capsys):  # noqa: F811
    argv = ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_prompts", "3"]
    code, said, errors = answer(main, monkeypatch, capsys, "--config", run_folder / "ppo.yaml", *argv)
    assert (code, errors) == (0, []), said
    assert "split_train 7, " in said
    assert "split_train_held_out 3" in said
    folder = run_folder / "runs" / "tiny" / "ppo_full"
    rows = [json.loads(line) for line in (folder / "eval_metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert json.loads((folder / "run.json").read_text())["data"]["prompts"]["split_train"] == 7


def test_too_few_prompts_to_take_some_out(run_folder, monkeypatch, capsys):  # noqa: F811
    recipe = run_folder / "ppo.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"train_prompts": 2}))
    code, _, errors = answer(main, monkeypatch, capsys, "--config", recipe, "--eval_on_start", "true")
    assert code == 2
    assert errors[0].startswith(
        "error: not enough training prompts for eval_prompts and train: expected eval_prompts 16"
    )
