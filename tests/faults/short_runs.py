"""A short run of each training stage, and everything that it leaves behind."""

import hashlib
import json
import shutil
from pathlib import Path

import tiny
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tiny_recipe import PROMPTS
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

STEPS = 4
LORA = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.2, "lora_target_modules": ["q_proj", "v_proj"]}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
SIZES |= {"vocab_size": 400, "max_position_embeddings": 256, "eos_token_id": 2, "pad_token_id": 2}

UNLIKE = {"settings/all/text_summary"}  # folders are in them


def prepare(folder: Path) -> Path:
    """Base model, trained reward stage and recipes: what every run starts from."""
    base, reward = folder / "base", folder / "reward"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.1)).save_pretrained(base)
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).save_pretrained(reward)
    for model in (base, reward):
        tiny.chat_tokenizer().save_pretrained(model)
    for name in ("messages", "preferences"):  # a part of the demo's: reading all of it would take longer than training
        rows = (tiny.DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(rows[:60]), encoding="utf-8")
    common = {"model_name_or_path": str(base), "use_cpu": True, "bf16": False, "disable_tqdm": True}
    ppo = PROMPTS | common | {"reward_model_path": str(reward), "max_steps": STEPS, "response_length": 5}
    ppo |= {"prompt_dataset": [str(folder / "messages.jsonl")]}
    # Whatever the next step depends on has a state: AdamW, the schedule, the KL coefficient, the scores' moments.
    ppo |= {"kl_target": 0.05, "use_score_scaling": True, "num_ppo_epochs": 1, "learning_rate": 1e-3}
    ppo |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    ppo |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "gradient_checkpointing": False}
    ppo |= {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "eval_prompts": 3}
    reward_stage = common | {"dataset_name": str(folder / "preferences.jsonl"), "max_examples": 16}
    reward_stage |= {"validation_examples": 8}
    reward_stage |= {"test_examples": 8, "num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 1}
    reward_stage |= {"logging_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
    for name, fields in {"ppo_full": ppo, "ppo_lora": ppo | LORA, "reward_stage": reward_stage}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(fields))
    return folder


def argv(start: Path, recipe: str, runs: Path) -> list[str]:
    return ["--config", str(start / f"{recipe}.yaml"), "--run", "run", "--runs_dir", str(runs)]


def results(stage: Path) -> dict:
    """Weights, rows and TensorBoard's values of a stage that is done: all that does not tell the time."""
    assert json.loads((stage / "run.json").read_text())["status"] == "done"
    found: dict = {"events": events(stage / "tensorboard")}
    for path in sorted([*stage.glob("*.safetensors"), *stage.glob("adapter/*.safetensors")]):
        found[str(path.relative_to(stage))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in stage.glob("*.jsonl"):
        found[path.name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    return found


def timeless(row: dict) -> dict:
    return {name: value for name, value in row.items() if not _tells_time(name)}


def _tells_time(name: str) -> bool:
    return name.startswith(("time/", "perf/")) or name.endswith(("eps", "runtime", "per_second"))


def events(board: Path) -> list:
    """TensorBoard's numbers and texts, (tag, step, value), from all its files: sorted, twice what is there twice."""
    found = []
    for path in board.glob("events.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if not _tells_time(value.tag) and value.tag not in UNLIKE:
                    found.append((value.tag, event.step, str(value.tensor.float_val or value.tensor.string_val)))
    return sorted(found)


def copy(stage: Path, runs: Path) -> Path:
    """A stage folder, to be broken elsewhere."""
    target = runs / "run" / stage.name
    shutil.copytree(stage, target)
    return target
