"""Prompts as a recipe wants them: those that are too long are left out, each with the template options that it has."""

import json

import tiny

from rlhf.config import PromptConfig
from rlhf.data import prompts as module
from rlhf.data.prompts import prompt_sets


def test_a_rows_template_options_win_over_the_recipes(tmp_path, monkeypatch):
    rows = [
        {"prompt": "plain", "prompt_id": "a"},
        {"prompt": "simple", "prompt_id": "c"},
        {"prompt": "own", "prompt_id": "b", "chat_template_kwargs": {"thinking": True, "style": "short"}},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = {}

    def length(tokenizer, messages, options):
        seen[messages[-1]["content"]] = options
        return [0] * (9 if options.get("thinking") else 1)

    monkeypatch.setattr(module, "encode_prompt", length)
    config = PromptConfig(
        prompt_dataset=[str(tmp_path / "rows.jsonl")],
        language=None,
        max_prompt_length=8,
        train_prompts=1,
        evaluation_prompts=1,
        rating_prompts=0,
    )
    split, counts = prompt_sets(config, tiny.chat_tokenizer(), {"thinking": False, "date": "today"})
    assert seen == {
        "plain": {"thinking": False, "date": "today"},
        "simple": {"thinking": False, "date": "today"},
        "own": {"thinking": True, "style": "short", "date": "today"},
    }
    assert counts["too_long"] == 1
    kept = [prompt.messages[-1]["content"] for prompt in (*split.train, *split.evaluation)]
    assert sorted(kept) == ["plain", "simple"]
