"""What `rlhf evaluate` refuses before it loads a model, and the prompt that it shows at its end."""

import json

import pytest

from rlhf.cli.evaluate import check_unseen, reward_models, sample
from rlhf.data.oasst import TextPrompt
from rlhf.errors import UserError


def test_prompts_of_a_conversation_that_a_model_was_trained_on_are_refused():
    """Whichever message of it: what counts is the conversation, not the message."""
    prompts = [TextPrompt(prompt_id=f"message {i}", tree_id=f"tree {i}", text="hi") for i in range(4)]
    runs = {"full": {"train_tree_ids": ["tree 9", "message 0"]}, "lora": {"train_tree_ids": ["tree 1", "tree 3"]}}
    with pytest.raises(UserError, match=r"^evaluation prompts: lora was trained on 2 of them; "):
        check_unseen(prompts, runs)
    check_unseen(prompts[::2], runs)
    check_unseen(prompts, {"full": {}})


def test_a_second_reward_model_of_the_same_conversations_is_refused(tmp_path):
    for name, openings in (("reward", ["a", "b", "c"]), ("reward_gold", ["b", "c", "d"])):
        (tmp_path / name).mkdir()
        facts = {"status": "done", "id": name, "train_openings": openings}
        (tmp_path / name / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"reward_gold: 2 openings of its training pairs are also in .*reward's; "):
        reward_models(tmp_path, None)
    assert reward_models(tmp_path, "other") == ("other", str(tmp_path / "reward_gold"))  # trained on who knows what


def test_the_prompt_that_is_shown_has_the_median_gain():
    scores = {"a": (0.0, 5.0), "b": (0.0, 1.0), "c": (4.0, 6.0)}  # gains 5, 1, 2
    rows = [
        {"prompt_id": name, "model": model, "prompt": f"question {name}", "response": f"{model} says", "score": score}
        for name, found in scores.items()
        for model, score in zip(("base", "full"), found, strict=True)
    ]
    assert sample(rows) == ['"question c"', "  base  +4.0  base says", "  full  +6.0  full says"]
    assert sample(rows[::2]) == []  # of the base model alone
