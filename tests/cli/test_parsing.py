"""Flags and recipes as settings, beside transformers' own parser of dataclasses."""

import re

import pytest
from transformers import HfArgumentParser

from rlhf.cli.parsing import parse, read_asked, read_recipe
from rlhf.config import (
    EvaluationConfig,
    ModelConfig,
    PPOStageConfig,
    PreferenceConfig,
    PromptConfig,
    ReportConfig,
    RewardStageConfig,
    StageRunConfig,
)
from rlhf.errors import UserError

BASE = ["--output_dir", "x", "--use_cpu", "true", "--bf16", "false"]
LINES = {
    "nothing": [],
    "numbers": ["--learning_rate", "3e-5", "--max_steps", "-1", "--seed=7", "--warmup_steps", "0.1"],
    "switches": ["--gradient_checkpointing", "--push_to_hub", "no", "--tf32", "false"],
    "texts": ["--run_name", "a b", "--report_to", "none", "--hub_model_id=--x"],
    "choices": ["--lr_scheduler_type", "cosine", "--optim", "adafactor", "--save_strategy", "no"],
    "mappings": ["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--lr_scheduler_type", "cosine_with_restarts"],
    "either spelling": ["--learning-rate", "1", "--max_grad_norm", "2"],
    "the last wins": ["--seed", "1", "--seed", "2"],
    "lists": ["--lora_target_modules", "q_proj", "v_proj", "--use_peft"],
}


def plain(settings):
    return [one.to_dict() if hasattr(one, "to_dict") else vars(one) for one in settings]


@pytest.mark.parametrize("argv", LINES.values(), ids=LINES)
@pytest.mark.parametrize("kind", [PPOStageConfig, RewardStageConfig])
def test_flags_mean_what_they_mean_to_transformers(argv, kind):
    kinds = [PromptConfig, ModelConfig, kind]
    theirs = HfArgumentParser(kinds, allow_abbrev=False).parse_args_into_dataclasses([*BASE, *argv])
    ours = parse(kinds, [*BASE, *argv])
    for mine, other in zip(plain(ours), plain(theirs), strict=True):
        assert mine == other


def test_flags_win_over_the_recipe_in_any_order(tmp_path):
    (tmp_path / "r.yaml").write_text("max_examples: 5\ngold: yes\nsplit_seed: 3\ndataset_dir:\n")
    recipe = ["--config", str(tmp_path / "r.yaml")]
    for argv in ([*recipe, "--split_seed", "9"], ["--split_seed", "9", f"--config={tmp_path / 'r.yaml'}"]):
        (found,) = parse([PreferenceConfig], argv)
        assert (found.max_examples, found.gold, found.split_seed, found.dataset_dir) == (5, True, 9, None)


def test_a_switch_is_yes_alone_and_no_with_no():
    assert parse([PreferenceConfig], ["--gold"])[0].gold is True
    assert parse([PreferenceConfig], ["--gold", "--no_gold"])[0].gold is False
    assert parse([PreferenceConfig], ["--no-gold", "--gold", "Y"])[0].gold is True
    with pytest.raises(UserError, match="unknown field '--no_split_seed'"):
        parse([PreferenceConfig], ["--no_split_seed"])


@pytest.mark.parametrize(
    ("flag", "kinds", "answer"),
    [
        ("warmup_ratio", [PPOStageConfig], r"; use --warmup_steps \(below 1 it is a share of all steps\)$"),
        ("warmup_ratio", [RewardStageConfig], r"; use --warmup_steps \(below 1"),
        ("torch_dtype", [PPOStageConfig, ModelConfig], "; use --dtype$"),
        ("evaluation-strategy", [RewardStageConfig], "; use --eval_strategy$"),
        ("top_p", [PPOStageConfig], "; use nothing: samples come from"),
        ("dataset_name", [PromptConfig, PPOStageConfig], "; use --prompt_dataset of the command"),
        ("max_new_tokens", [EvaluationConfig], "; --help all lists all fields$"),
    ],
)
def test_an_old_name_is_answered_by_the_new_one_where_there_is_one(tmp_path, flag, kinds, answer):
    with pytest.raises(UserError, match=f"unknown field '--{flag}'{answer}"):
        parse(kinds, [f"--{flag}", "1"])
    name, same = flag.replace("-", "_"), answer.replace("use --", "use ")
    (tmp_path / "r.yaml").write_text(f"{name}: 1\n")
    with pytest.raises(UserError, match=f"r.yaml: field '{name}': unknown field{same}"):
        parse(kinds, ["--config", str(tmp_path / "r.yaml")])


def test_lists_take_all_up_to_the_next_flag():
    assert parse([ReportConfig], ["--runs", "a", "b", "--title", "t"])[0].runs == ["a", "b"]
    assert parse([ReportConfig], [])[0].runs == []
    with pytest.raises(UserError, match="--runs: expected a value after it"):
        parse([ReportConfig], ["--runs", "--title", "t"])


def test_a_second_value_is_not_dropped():
    with pytest.raises(UserError, match="unknown field 'b'; --title a takes one value"):
        parse([ReportConfig], ["--title", "a", "b"])


def test_starting_over_is_a_flag_alone(tmp_path):
    """A recipe that said it would run a stage again for ever."""
    (tmp_path / "r.yaml").write_text("redo: yes\n")
    recipe = ["--config", str(tmp_path / "r.yaml")]
    assert read_asked([StageRunConfig], recipe).redo is False
    assert read_asked([StageRunConfig], [*recipe, "--redo"]).redo is True
    assert read_asked([StageRunConfig], [*recipe, "--redo", "no"]).redo is False


def test_the_largest_numbers_and_the_largest_recipe(tmp_path):
    for text in ("1000000000000", "-1000000000000"):
        assert parse([PreferenceConfig], ["--split_seed", text])[0].split_seed == int(text)
    for text in ("1000000000001", "-1000000000001"):
        with pytest.raises(UserError, match=r"^--split_seed: expected a number between ±1e\+12, found"):
            parse([PreferenceConfig], ["--split_seed", text])
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(b"gold: yes #".ljust(1 << 20))
    assert read_recipe(recipe) == {"gold": True}
    recipe.write_bytes(b"gold: yes #".ljust((1 << 20) + 1))
    with pytest.raises(UserError, match="expected at most 1,048,576 bytes; the file is larger"):
        read_recipe(recipe)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("title: [a]", "field 'title': expected one value, found ['a']"),
        ("runs: []", "field 'runs': expected values, found []"),
        ("runs: [[a]]", "field 'runs': expected plain values, found [['a']]"),
        ("runs: {a: [b]}", "field 'runs': expected plain values, found {'a': ['b']}"),
        ("runs: !!set {a}", "field 'runs': expected plain values, found {'a'}"),
    ],
)
def test_lists_in_recipes_are_of_plain_values_where_a_field_takes_several(tmp_path, line, words):
    (tmp_path / "r.yaml").write_text(line + "\n")
    with pytest.raises(UserError, match=re.escape(words) + "$"):
        parse([ReportConfig], ["--config", str(tmp_path / "r.yaml")])
    (tmp_path / "r.yaml").write_text("runs: [a, b]\n")
    assert parse([ReportConfig], ["--config", str(tmp_path / "r.yaml")])[0].runs == ["a", "b"]


def test_no_before_a_switch_takes_no_value():
    with pytest.raises(UserError, match="unknown field '--no_gold'"):
        parse([PreferenceConfig], ["--no_gold", "yes"])
