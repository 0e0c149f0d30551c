"""What `rlhf evaluate` refuses before it loads a model, and the prompt that it shows at its end."""

import json
from types import SimpleNamespace

import pytest

from rlhf.cli import evaluate
from rlhf.cli.evaluate import begun_precision, check_unseen, gains_table, reward_models, sample, stages_read
from rlhf.config import EvaluationConfig
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
    assert reward_models(tmp_path, None, ["a:b"]) == (None, str(tmp_path / "reward_gold"))  # the first one scores not


def test_the_prompt_that_is_shown_has_the_median_gain():
    scores = {"a": (0.0, 5.0), "b": (0.0, 1.0), "c": (4.0, 6.0)}  # gains 5, 1, 2
    rows = [
        {"prompt_id": name, "model": model, "prompt": f"question {name}", "response": f"{model} says", "score": score}
        for name, found in scores.items()
        for model, score in zip(("base", "full"), found, strict=True)
    ]
    assert sample(rows) == ['"question c"', "  base  +4.0  base says", "  full  +6.0  full says"]
    assert sample(rows[::2]) == []  # of the base model alone


def test_only_an_evaluation_that_has_begun_and_may_choose_keeps_its_precision(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"precision": {"taken": "bf16", "why": "measured"}}))
    free, told = EvaluationConfig(eval_precision="auto"), EvaluationConfig(eval_precision="fp32")
    assert begun_precision(tmp_path, free) is None  # no answer yet: it begins anew
    (tmp_path / "answered.jsonl").write_text("")
    assert begun_precision(tmp_path, free) == {"taken": "bf16", "why": "measured"}
    assert begun_precision(tmp_path, told) is None


def test_both_reward_models_figures_stand_in_the_table_each_under_its_own():
    summary = {
        "confidence": 0.9,
        "models": {
            "base": {"mean_reward": 0.25, "eos_rate": 1.0},
            "full": {"mean_reward": 1.5, "eos_rate": 0.75},
            "lora": {"mean_reward": 0.5, "eos_rate": 0.5},
        },
        "gains": {
            "full": {"gain": 1.25, "interval": [0.5, 2.0], "win_rate": 0.8},
            "lora": {"gain": 0.25, "interval": [-0.1, 0.6], "win_rate": 0.6},
        },
        "validity": {"full": {"gold": {"gain": -0.75, "interval": [-1.5, 0.1]}}, "lora": {}},
    }
    lines = gains_table(summary).split("\n")
    assert len(set(map(len, lines))) == 1  # the last column is below its head in each
    assert [line.split() for line in lines] == [
        ["reward", "gain", "[90", "%]", "second", "model", "[90", "%]", "wins", "ended"],
        ["base", "0.25", "100", "%"],
        ["full", "1.50", "+1.25", "[+0.50,", "+2.00]", "-0.75", "[-1.50,", "+0.10]", "80", "%", "75", "%"],
        ["LoRA", "0.50", "+0.25", "[-0.10,", "+0.60]", "60", "%", "50", "%"],
    ]


def test_an_evaluation_rests_on_the_stages_that_it_has_read(tmp_path):
    for name in ("reward", "reward_gold", "ppo_lora"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"status": "done", "id": name}))
    assert stages_read(tmp_path, given=False) == ["reward", "reward_gold", "ppo_lora"]
    assert stages_read(tmp_path, given=True) == ["reward_gold", "ppo_lora"]
    assert reward_models(tmp_path, None) == (str(tmp_path / "reward"), str(tmp_path / "reward_gold"))
    assert reward_models(tmp_path, None, ["a:b"]) == (None, str(tmp_path / "reward_gold"))  # functions alone
    assert reward_models(tmp_path, "other", ["a:b"]) == ("other", str(tmp_path / "reward_gold"))


@pytest.mark.parametrize(
    ("paths", "functions", "first", "second"),
    [
        (("r", None), [], "reward model r", None),
        (("r", "g"), [], "reward model r", "second reward model g"),
        (("r", "g"), [len], ("r", [len]), "second reward model g"),
        ((None, "g"), [len], (None, [len]), "second reward model g"),
        ((None, None), [len], (None, [len]), None),
    ],
)
def test_the_second_reward_model_only_checks_what_the_first_or_functions_score(
    monkeypatch, paths, functions, first, second
):
    monkeypatch.setattr(evaluate, "load_reward_model", lambda path: path)
    monkeypatch.setattr(evaluate, "ready", lambda model, device: model)
    monkeypatch.setattr(evaluate, "as_reward", lambda name, model, *read_by: f"{name} {model}")
    monkeypatch.setattr(evaluate, "weighted_rewards", lambda model, functions, *read_by: (model, functions))
    found = evaluate.judges(*paths, functions, SimpleNamespace(device="cpu"), None, EvaluationConfig())
    assert found == (first, second)


def test_the_first_responses_of_each_model_are_sent_to_the_trackers():
    rows = [{"model": model, "prompt_id": i} for i in range(3) for model in ("base", "full")]
    found = [(number, row["model"], row["prompt_id"]) for number, row in evaluate._first(rows, 2)]
    assert found == [(0, "base", 0), (1, "base", 1), (0, "full", 0), (1, "full", 1)]
