"""Responses that are on the disk before an evaluation has ended."""

import json

import pytest

from rlhf.data.oasst import TextPrompt
from rlhf.evaluation.answered import Answered


def row(prompt, model="full", said="so"):
    return {"prompt_id": prompt, "model": model, "response": said, "score": 0.5}


PROMPTS = [TextPrompt(prompt_id=name, tree_id="t", text="why?") for name in ("b", "a", "c")]


def test_what_was_answered_is_found_again_by_set_model_and_prompt(tmp_path):
    answered = Answered(tmp_path)
    assert answered.of("test", "full", PROMPTS) == {}
    answered.add("test", [row("a"), row("b", said="ü\u2028")])
    answered.add("test", [row("a", "lora", "no")])
    answered.add("rating", [row("c")])
    assert "\u00fc" in next(tmp_path.iterdir()).read_text(encoding="utf-8")  # as a person reads it
    again = Answered(tmp_path)
    assert again.of("test", "full", PROMPTS) == {"b": row("b", said="ü\u2028"), "a": row("a")}
    assert again.of("test", "lora", PROMPTS) == {"a": row("a", "lora", "no")}
    assert again.of("rating", "full", PROMPTS) == {"c": row("c")}
    assert again.of("rating", "full", PROMPTS[:2]) == {}
    again.remove()
    assert list(tmp_path.iterdir()) == []
    again.remove()  # it is gone already


@pytest.mark.parametrize("rest", ['{"set": "test", "promp', '{"prompt_id": "ü'])
def test_an_incomplete_last_line_goes_and_what_comes_after_it_is_kept(tmp_path, rest):
    Answered(tmp_path).add("test", [row("a")])
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes() + rest.encode()[:-1])
    answered = Answered(tmp_path)
    assert answered.of("test", "full", PROMPTS) == {"a": row("a")}
    answered.add("test", [row("b")])
    assert [json.loads(line)["prompt_id"] for line in path.read_text().splitlines()] == ["a", "b"]
    assert list(Answered(tmp_path).of("test", "full", PROMPTS)) == ["b", "a"]
