"""Tasks with a known answer: say tokens of one class and stop. PPO has to find it, seed after seed."""

import pytest
import tiny
import torch
from peft import LoraConfig
from tiny_ppo import metrics, trainer
from transformers import LlamaConfig, LlamaForCausalLM

EOS, VOCABULARY, LENGTH = 2, 32, 6
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]
ROWS = [{"input_ids": [3 + i % 29, 3 + i * 7 % 29], "prompt_id": str(i)} for i in range(128)]


def policy(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=EOS,
        bos_token_id=1,
        pad_token_id=EOS,
        initializer_range=0.2,  # so that the attention, all that LoRA adapts, matters
    )
    return LlamaForCausalLM(config).eval()


def odd_and_stop(completion_ids, **_):
    """Half for the share of odd tokens, half for an end: at best 1."""
    scores = []
    for ids in completion_ids:
        said = [token for token in ids if token != EOS]
        odd = sum(token % 2 for token in said) / len(said) if said else 0.0
        scores.append(0.5 * odd + 0.5 * (ids[-1] == EOS))
    return scores


def contrary(completion_ids, **_):
    return [-score for score in odd_and_stop(completion_ids)]


def learn(folder, seed, lora=False, reward=odd_and_stop, **options):
    settings = {
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "num_ppo_epochs": 4,
        "response_length": LENGTH,
        "temperature": 1.0,
        "kl_coef": 0.0,
        "vf_coef": 0.5,
        "cliprange_value": 10.0,
        "learning_rate": 1e-2 if lora else 3e-3,
        "critic_learning_rate": 3e-3,
        "max_steps": 50,
        "lr_scheduler_type": "linear",
        "seed": seed,
        "stop_token_id": EOS,
        "num_sample_generations": 0,
    }
    config = (
        LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]) if lora else None
    )
    given = {"model": policy(seed), "processing_class": tiny.chat_tokenizer(), "peft_config": config}
    run = trainer(folder, rows=ROWS, reward=reward, given=given, **settings | options)
    run.train()
    return metrics(folder)


def mean(rows, name="objective/scores"):
    return sum(row[name] for row in rows) / len(rows)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("seed", SEEDS)
def test_it_reaches_nine_tenths_of_the_best_reward(tmp_path, seed, lora):
    rows = learn(tmp_path, seed, lora)
    assert mean(rows[:2]) < 0.5
    assert mean(rows[-5:]) >= 0.9


def test_warm_up_keeps_the_first_updates_small(tmp_path):
    rows = learn(tmp_path, 0, warmup_steps=20, lr_scheduler_type="linear", max_steps=10)
    assert max(row["policy/approxkl_avg"] for row in rows) < 0.02


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("seed", SEEDS)
def test_with_the_sign_flipped_it_goes_down(tmp_path, seed, lora):
    rows = learn(tmp_path, seed, lora, reward=contrary, max_steps=30)
    assert mean(rows[-5:]) > mean(rows[:2])  # of the flipped reward
    assert -mean(rows[-5:]) < 0.15  # the rule's own


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_controller_keeps_kl_in_the_band_while_the_reward_rises(tmp_path, seed, lora):
    options = {"kl_coef": 0.4, "kl_target": 0.055, "kl_horizon": 1000, "max_steps": 60, "num_ppo_epochs": 2}
    options |= {"lr_scheduler_type": "constant"}
    options |= {"per_device_train_batch_size": 128, "learning_rate": 1e-3 if lora else 3e-4}
    rows = learn(tmp_path, seed, lora, **options)
    late = rows[15:]
    inside = [0.02 <= row["objective/kl_per_token"] <= 0.1 for row in late]
    assert sum(inside) >= 0.8 * len(late), [round(row["objective/kl_per_token"], 3) for row in rows]
    assert mean(rows[-10:]) > mean(rows[:3]) + 0.05
