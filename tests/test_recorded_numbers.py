"""Every number of a few runs is as it was recorded, so that a change to any of them is seen, wherever it comes from.

What is right is held by the tests of each part, by hand and against other implementations; settings here are far from
defaults and from one another. Where numbers are meant to change, record them again, and look at what changed:

    python tests/test_recorded_numbers.py
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import rating_sheets
import tiny
import tiny_ppo
import yaml
from peft import LoraConfig
from recorded import different

from rlhf.evaluation.summary import summarise
from rlhf.ratings.analyse import analyse
from rlhf.reporting.conclusions import gain_conclusions, verdict

RECORDED = Path(__file__).with_suffix(".json")
ENDS = list(range(3, 70))  # so many ids end a response that most end early, and some do not


def ending(make: Callable[[], Any]) -> Any:
    model = make()
    model.generation_config.eos_token_id = ENDS
    return model


def by_length(completion_ids, log_metric, log_extra, **_):
    log_metric("longest", max(map(len, completion_ids)))
    log_extra("tokens", [len(ids) for ids in completion_ids])
    return [len(ids) / 4 - 1 for ids in completion_ids]


def by_ids(prompts, completion_ids, log_metric, log_extra, **_):
    log_metric("longest", max(map(len, prompts)))
    log_extra("first", [ids[0] for ids in completion_ids])
    return [None if ids[0] % 5 == 0 else (sum(ids) % 7) / 3 - 1 for ids in completion_ids]


def of_trainer(folder: Path, **arguments: Any) -> Any:
    """Metrics, samples and what the weights have become."""
    trainer = tiny_ppo.trainer(folder, **arguments)
    trainer.train()
    trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {
        "metrics": [tiny_ppo.timeless(row) for row in tiny_ppo.metrics(folder)],
        "samples": samples,
        "evaluated": [
            {
                name: x
                for name, x in row.items()
                if name.startswith("eval/") and not name.endswith(("runtime", "second"))
            }
            for row in trainer.state.log_history
        ],
        "weights": {
            name: [p.abs().mean().item(), p.std(correction=0).item()] for name, p in trained[:4] + trained[-4:]
        },
    }


FULL = """
{learning_rate: 0.0003, response_length: 9, temperature: 0.8, num_train_epochs: 3,
 num_mini_batches: 2, num_ppo_epochs: 3, gamma: 0.96,
 lam: 0.8, vf_coef: 0.4, cliprange: 0.1, cliprange_value: 0.05, max_grad_norm: 0.4, kl_coef: 0.3, kl_estimator: k3,
 missing_eos_penalty: 0.3, score_clip: 0.12, whiten_rewards: true, lr_scheduler_type: linear, warmup_steps: 1,
 critic_learning_rate: 0.002, critic_warmup_steps: 1, adam_beta1: 0.8, adam_beta2: 0.95, weight_decay: 0.2,
 bootstrap_truncated: true, num_sample_generations: 2, eval_strategy: steps, eval_steps: 2,
 per_device_eval_batch_size: 3}
"""
LORA = """
{response_length: 7, temperature: 1.3, learning_rate: 0.02, num_train_epochs: 3, critic: shared, kl_target: 0.02,
 kl_horizon: 60, reward_weights: [0.7, 2.0, -0.4], use_score_scaling: true, use_score_norm: true, score_clip: 1.1,
 score_norm_samples: 6, missing_eos_penalty: 0.2, close_truncated: true, whiten_advantages: false,
 max_prompt_tokens: 12, long_prompts: truncate, target_kl: 0.01, per_device_train_batch_size: 4,
 lr_scheduler_type: cosine, num_sample_generations: 2, cliprange_value: 0.05}
"""


def full(folder: Path) -> Any:
    evaluated = [{"prompt": f"what is {i} and why"} for i in range(5)]
    given = {"model": ending(tiny.gpt2), "eval_dataset": evaluated}
    return of_trainer(folder, family="gpt2", given=given, **yaml.safe_load(FULL))


def lora(folder: Path) -> Any:
    adapter = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.2, target_modules=["v_proj", "down_proj"])
    rewards = [tiny.llama_reward(), by_length, by_ids]
    given = {"model": ending(tiny.llama), "peft_config": adapter, "reward_model": rewards}
    return of_trainer(folder, family="llama", given=given, **yaml.safe_load(LORA))


def response(i: int, model: str) -> dict[str, Any]:
    """A row of responses.jsonl; scores, lengths and ends depend on one another a little, and on the model."""
    k = ("base", "full", "lora").index(model)
    noise = i * 37 % 19 / 19 + (i * (k + 4) * 13 % 11) / 11 * (k + 4) / 4
    length, eos = 5 + i * 7 % 17 + 2 * k, (i * 5 + k) % 4 > 0
    words = [f"word{j * (i + k) % (6 + k)}" for j in range(length)] if (i + k) % 9 else []
    return {
        "prompt_id": f"p{i}",
        "model": model,
        "prompt": f"Question {i}?",
        "response": " ".join(words),
        "prompt_length": 3 + i % 5,
        "response_length": length,
        "eos": eos,
        "score": noise - 1 + 0.3 * k + 0.4 * eos - length / 60,
        "gold_score": noise * 2 + 0.2 * k - 0.5 * eos + i % 3,
        "kl": 0.3 * k + k * length / 30,
    }


def evaluation(_: Path) -> Any:
    models = ["base", "full", "lora"]
    found = summarise([response(i, model) for i in range(23) for model in models], models, 0.9, 4)
    said = verdict(found)
    assert said is not None
    return {"evaluation": found, "verdict": asdict(said), "words": [gain_conclusions(found, m) for m in models[1:]]}


def ratings(_: Path) -> Any:
    key = rating_sheets.key(6, repeats=3)
    rules = [lambda item, name: 1 + hash_of(item["item_id"] + name) % 5, lambda item, name: 2 + hash_of(name) % 3]
    rules.append(lambda item, name: min(5, 1 + len(item["response"]) % 5))
    sheets = [rating_sheets.filled(key, f"rater {n}", rule, n) for n, rule in enumerate(rules)]
    return analyse(key, sheets, list(rating_sheets.MODELS), 0.9, 2)


def hash_of(text: str) -> int:
    return sum((i + 1) * ord(letter) for i, letter in enumerate(text))


RUNS = {"full": full, "lora": lora, "evaluation": evaluation, "ratings": ratings}
TRAINED = ("full", "lora")  # their last digits depend on the machine, and an optimizer multiplies what differs


def plain(record: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(record))


@pytest.mark.parametrize("name", RUNS)
def test_numbers_are_those_recorded(tmp_path, name):
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    assert different(plain(RUNS[name](tmp_path)), recorded, 1e-2 if name in TRAINED else 1e-6) == []


def test_the_runs_are_worth_recording():
    """What they are to hold happens in them: responses end and are truncated, ratios, values and scores are clipped."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    for name in TRAINED:
        rows = [row for row in recorded[name]["metrics"] if "objective/kl" in row]
        for metric in ("objective/eos_rate", "policy/clipfrac_avg", "val/clipfrac_avg"):
            assert any(0 < row[metric] < 1 for row in rows), (name, metric)
        assert any(abs(row["objective/kl_per_token"]) > 1e-3 for row in rows), name
    assert any(row["policy/grad_norm"] > 0 for row in recorded["full"]["metrics"][2:] if "policy/grad_norm" in row)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    before = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    with tempfile.TemporaryDirectory() as top:
        now = {name: plain(run(Path(top) / name)) for name, run in RUNS.items()}
    print("\n".join(different(now, before)[:99]))
    RECORDED.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
