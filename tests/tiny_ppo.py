"""Tiny PPO runs that the tests of the trainer share."""

import json

import tiny
from peft import LoraConfig

from rlhf.config import PPOConfig
from rlhf.ppo.trainer import PPOTrainer

PROMPTS = [{"prompt": [{"role": "user", "content": "hello there " * (i % 4 + 1)}]} for i in range(7)]
FAMILIES = {
    "gpt2": (tiny.gpt2_tokenizer, tiny.gpt2, tiny.gpt2_reward),
    "llama": (tiny.chat_tokenizer, tiny.llama, tiny.llama_reward),
}
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])


def trainer(folder, family="llama", lora=False, rows=PROMPTS, reward=None, given=None, **options):
    """given: arguments of PPOTrainer; options: of PPOConfig."""
    make_tokenizer, make_policy, make_reward = FAMILIES[family]
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_ppo_epochs": 2,
        "response_length": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 2,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 5,
    }
    arguments = {
        "processing_class": make_tokenizer(),
        "model": make_policy(),
        "ref_model": None,
        "reward_model": reward or make_reward(),
        "train_dataset": rows,
        "peft_config": LORA if lora else None,
    }
    return PPOTrainer(args=PPOConfig(**settings | options), **arguments | (given or {}))


def timeless(row):
    """A row of metrics without what the clock said."""
    return {name: value for name, value in row.items() if name != "eps" and not name.startswith(("time/", "perf/"))}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
