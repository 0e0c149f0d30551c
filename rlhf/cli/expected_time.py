"""How long a pipeline's stages will take on this CPU: what they will compute, by their settings, at its speed."""

import math
import traceback
from collections.abc import Sequence
from itertools import islice
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlhf.config import EvaluationConfig, PPOStageConfig, PreferenceConfig, PromptConfig, RewardStageConfig
from rlhf.config.batch import batch_facts
from rlhf.config.precision import bf16_speed, evaluation_precision
from rlhf.console.words import about
from rlhf.data.sources import fetch, is_hub_id, read_rows
from rlhf.memory_estimate.account import read_config
from rlhf.perf.hardware import layer_speed
from rlhf.perf.work import Flops
from rlhf.ppo.optim import count_steps
from rlhf.storage.stages import POLICIES

# Fitted to one run of the recipe demo on two idle cores of a Xeon with AMX (November 2026), all of it in bf16: reward
# models 42 s each, PPO 70 s each, evaluation 75 s, and 20 s beside them.
OUTSIDE = 32.0  # seconds of a stage that no setting changes: loading, first passes, saving; once more for the report

REST = 0.34  # what a stage does beside its matrix products while it computes, in times of these products in fp32

CHARACTERS = 4  # a token, about

_ROWS = 100  # of data, whose lengths stand for all


def expected_time(settings: Sequence[Sequence[Any]], recipe: Sequence[str]) -> str:
    """In words. settings: of each stage that will run; recipe: the names of all its stages.

    Empty where it cannot be known: no model is fetched from the hub for it.
    """
    try:
        names = [_base(given) for given in settings]
        if not names or any(not name or is_hub_id(name) for name in names):
            return ""
        models = {name: _counted(name) for name in set(names)}
        speed = layer_speed(torch.float32)
        seconds = OUTSIDE
        for name, (_, data, *_, args) in zip(names, settings, strict=True):
            products = speed * (bf16_speed() if _is_bf16(args) else 1)
            flops = _flops(data, args, models[name], recipe)
            seconds += OUTSIDE + flops * (1 / products + REST / speed)
        return about(seconds)
    except Exception:  # an estimate must not end a run; the reason is in the log
        traceback.print_exc()
        return ""


def _base(given: Sequence[Any]) -> str:
    name: str | None = given[2].base_model if len(given) == 3 else given[2].model_name_or_path
    return name or ""


def _counted(name: str) -> Flops:
    config = read_config(name)  # not below: on the meta device no model can be converted
    with torch.device("meta"):
        return Flops.of(AutoModelForCausalLM.from_config(config))


def _is_bf16(args: Any) -> bool:
    if isinstance(args, EvaluationConfig):
        return evaluation_precision(args.eval_precision)["taken"] == "bf16"
    return bool(args.bf16)


def _flops(data: Any, args: Any, model: Flops, recipe: Sequence[str]) -> float:
    """Of a stage's passes."""
    if isinstance(data, PreferenceConfig):
        return _of_reward(data, args, model)
    prompt = _tokens(data.prompt_dataset, ["text", "prompt"], data.max_prompt_length)
    return (_of_evaluation if isinstance(args, EvaluationConfig) else _of_ppo)(data, args, model, prompt, recipe)


def _of_reward(data: PreferenceConfig, args: RewardStageConfig, model: Flops) -> float:
    limit = args.max_length or 512
    pair = [sum(_tokens([data.dataset_name], [side], limit) for side in ("chosen", "rejected"))]
    batch = batch_facts(args)["global_batch_size"]
    per_epoch = math.ceil(data.max_examples / batch)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    every = {"steps": args.eval_steps or args.logging_steps, "epoch": per_epoch}.get(str(args.eval_strategy), 0)
    looks = 1 + (math.ceil(steps / every) if every >= 1 else 0)  # the first before training
    read = data.validation_examples * looks + 2 * data.test_examples
    return model.training(pair * steps * batch) + model.forward(pair * read)


def _of_ppo(data: PromptConfig, args: PPOStageConfig, model: Flops, prompt: int, _: Sequence[str]) -> float:
    """Every response is taken to be as long as it may be."""
    batch = batch_facts(args)["global_batch_size"]
    n, critic = count_steps(args, data.train_prompts, batch) * batch, args.critic == "separate"
    texts, logits = [prompt + args.response_length] * n, args.response_length * n
    read = (4 + critic) * model.forward(texts, logits)  # sampled; then policy, reference, reward model, critic
    return read + args.num_ppo_epochs * (1 + critic) * model.training(texts, logits)


def _of_evaluation(
    data: PromptConfig, args: EvaluationConfig, model: Flops, prompt: int, recipe: Sequence[str]
) -> float:
    n = data.evaluation_prompts + data.rating_prompts
    texts, logits = [prompt + args.eval_response_length] * n, args.eval_response_length * n
    tuned, judges = len(set(POLICIES.values()) & set(recipe)), 2 if "reward_gold" in recipe else 1
    # Each answer is sampled and scored; for the KL two models read those of tuned ones.
    return ((1 + tuned) * (1 + judges) + 2 * tuned) * model.forward(texts, logits)


def _tokens(sources: Sequence[str], fields: Sequence[str], limit: int) -> int:
    """Mean length of a field's text in local data, of at most `limit`; half of that where nothing says."""
    rows = [
        row for source in sources if not is_hub_id(source) for _, row in islice(read_rows(fetch(source, "*")[0]), _ROWS)
    ]
    texts = [row[name] for row in rows for name in fields if isinstance(row, dict) and isinstance(row.get(name), str)]
    return round(mean(min(len(text) / CHARACTERS, limit) for text in texts)) if texts else limit // 2
