"""A recipe of all stages on tiny models."""

from pathlib import Path
from typing import Any

import tiny
import yaml

PROMPTS = {
    "prompt_dataset": ["demo:messages.jsonl"],
    "max_prompt_length": 120,
    "train_prompts": 10,
    "evaluation_prompts": 7,
    "rating_prompts": 3,
}


def recipe(folder: Path, **changes: dict[str, Any]) -> Path:
    """Write a base model and a recipe that starts from it; changes: stage -> fields."""
    folder.mkdir(parents=True)
    base = folder / "base"
    tiny.gpt2().save_pretrained(base)
    tiny.gpt2_tokenizer().save_pretrained(base)
    reward = {
        "model_name_or_path": str(base),
        "dataset_name": "demo:preferences.jsonl",
        "max_examples": 16,
        "validation_examples": 8,
        "test_examples": 8,
        "num_train_epochs": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
    }
    ppo = PROMPTS | {
        "model_name_or_path": str(base),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "num_ppo_epochs": 1,
        "response_length": 6,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
    }
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}
    evaluation = PROMPTS | {"base_model": str(base), "eval_response_length": 6}
    gold = {"reward_gold": reward | {"gold": True, "seed": 7}}
    stages = {"reward": reward, **gold, "ppo_full": ppo, "ppo_lora": ppo | lora, "evaluation": evaluation}
    for name, fields in stages.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(fields | changes.get(name, {})))
    return folder
