"""Columns of responses in a terminal."""

import json

import pytest

from rlhf.cli import compare
from rlhf.cli.compare import side_by_side
from rlhf.errors import UserError


def row(model, response, eos=True):
    return {"model": model, "response": response, "score": 1.25, "response_length": 7, "eos": eos}


def test_columns_by_hand():
    text = side_by_side([row("base", "one two three four five"), row("full", "a\n\nb", eos=False)], width=43)
    assert text.splitlines() == [
        "base  score +1.25  7   full  score +1.25  7",
        "tokens                 tokens (truncated)",
        "-" * 20 + "   " + "-" * 20,
        "one two three four     a",
        "five",
        " " * 23 + "b",
    ]


def test_a_response_does_not_steer_the_terminal():
    assert "\x1b" not in side_by_side([row("base", "red \x1b[31m\x07 text")], 80)


def test_prompts_are_read_until_an_empty_line_or_the_end(monkeypatch):
    def typed(*lines):
        left = [*lines]

        def read(mark):
            assert mark == "prompt> "
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr("builtins.input", read)
        return list(compare._prompts(None))

    assert typed(" one ", "two", "  ", "three") == ["one", "two"]
    assert typed("one") == ["one"]
    assert list(compare._prompts("given")) == ["given"]
    assert list(compare._prompts("")) == [""]


def write(path, facts):
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(facts))


def test_the_models_are_those_that_the_run_has_evaluated(tmp_path):
    folder = tmp_path / "run" / "evaluation"
    write(tmp_path / "run" / "ppo_lora" / "run.json", {"status": "done"})
    write(tmp_path / "run" / "ppo_full" / "run.json", {"status": "done"})
    write(folder / "run.json", {"model_paths": {"base": str(tmp_path / "gone"), "lora": "ppo_lora", "other": "x"}})
    assert compare._models(folder, "hub/base") == {"base": "hub/base", "lora": str(tmp_path / "run" / "ppo_lora")}
    (tmp_path / "gone").mkdir()
    assert compare._models(folder, "hub/base")["base"] == str(tmp_path / "gone")
    for broken in ({}, {"model_paths": ["base"]}, {"model_paths": {"lora": "x"}}):
        (folder / "run.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match="has no model_paths; run the evaluation again"):
            compare._models(folder, "hub/base")


def test_the_judge_is_the_evaluations(tmp_path):
    folder = tmp_path / "run" / "evaluation"
    write(folder / "run.json", {"judge_paths": {"reward": str(tmp_path / "judge")}})
    with pytest.raises(UserError, match="reward: expected a stage that is done"):
        compare._judge(folder, None)
    write(tmp_path / "run" / "reward" / "run.json", {"status": "done"})
    assert compare._judge(folder, None) == str(tmp_path / "run" / "reward")
    assert compare._judge(folder, "given") == "given"
    (tmp_path / "judge").mkdir()
    assert compare._judge(folder, "given") == str(tmp_path / "judge")
    (folder / "run.json").write_text("{}")  # of an earlier version
    assert compare._judge(folder, "given") == "given"
