"""Reward training and evaluation, by either side."""

import time
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset

from rlhf.benchmark import work
from rlhf.benchmark.clock import Clock, most_memory
from rlhf.functional.batching import left_pad


def reward(run: work.Run, folder: str, ours: bool) -> dict[str, Any]:
    """`steps` optimizer steps of 8 pairs with the Bradley-Terry loss, by our trainer or TRL's."""
    from trl import RewardConfig, RewardTrainer

    from rlhf.config import RewardStageConfig
    from rlhf.models.kernels.attention import use_cpu_attention
    from rlhf.models.kernels.dropout_gelu import fuse_gelu
    from rlhf.reward.packed import packed_passes
    from rlhf.reward.trainer import PreferenceTrainer

    tokenizer = work.tokenizer_of(run.shape)
    _, model = work.models_of(run.shape, tokenizer, run.seed)
    rows: list[dict[str, Any]] = list(work.pairs_of(run.shape, tokenizer, run.seed, work.PAIRS * run.steps))
    sides = [row[side] for row in rows for side in ("chosen_ids", "rejected_ids")]
    options: dict[str, Any] = work.precision(run) | {
        "output_dir": folder,
        "per_device_train_batch_size": work.PAIRS,
        "num_train_epochs": 1,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": run.seed,
        "max_length": None,
    }
    before, clock = most_memory(), Clock("learn")
    if ours:
        fuse_gelu(model)  # as our loaders do
        use_cpu_attention(model)
        more = {"loss_type": "bradley_terry", "train_sampling_strategy": "group_by_length", "eval_strategy": "no"}
        rows = [row | {"length": max(map(len, row.values()))} for row in rows]
        kind, args = PreferenceTrainer, RewardStageConfig(**options | more | {"load_best_model_at_end": False})
    else:
        kind, args = RewardTrainer, RewardConfig(**options | {"save_strategy": "no"})  # type: ignore[assignment]
    trainer = kind(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[clock]
    )
    with packed_passes(model) if ours else nullcontext():
        trainer.train()
    return {
        "steps": [step for step in clock.steps if step][1:],
        "prompt_tokens": sum(map(len, sides)) / run.steps,  # with the responses; mean per step
        "response_tokens": [],
        "updates": trainer.state.global_step,
        "memory_before": before,
        "memory_peak": most_memory(),
    }


@torch.no_grad()
def evaluation(run: work.Run, folder: str, ours: bool) -> dict[str, Any]:
    """Respond to one batch of prompts and score it, `steps` times: as our evaluation does, or with plain `generate`."""
    tokenizer = work.tokenizer_of(run.shape)
    policy, reward_model = (model.eval() for model in work.models_of(run.shape, tokenizer, run.seed))
    prompts = work.prompts_of(run.shape, tokenizer, run.seed)
    before, steps, tokens = most_memory(), [], []
    for step in range(run.steps):
        start = time.perf_counter()
        answers = (_ours if ours else _plain)(run, tokenizer, policy, reward_model, prompts, step)
        steps.append({"evaluation": time.perf_counter() - start})
        tokens.append(sum(map(len, answers)))
    return {
        "steps": steps[1:],
        "prompt_tokens": sum(map(len, prompts)),
        "response_tokens": tokens,
        "updates": 0,
        "memory_before": before,
        "memory_peak": most_memory(),
    }


def _ours(run: work.Run, tokenizer: Any, policy: Any, reward_model: Any, prompts: list[list[int]], step: int) -> Any:
    from rlhf.generation.decode import generate, uniforms
    from rlhf.models.kernels.attention import use_cpu_attention
    from rlhf.models.kernels.dropout_gelu import fuse_gelu
    from rlhf.reward.scoring import score_rows

    for model in (policy, reward_model):
        fuse_gelu(model)
        use_cpu_attention(model)
    u = uniforms(run.seed, step, [str(i) for i in range(len(prompts))], run.shape.response)
    answers = generate(policy, prompts, u, [tokenizer.eos_token_id], 1.0)
    score_rows(reward_model, [p + a for p, a in zip(prompts, answers, strict=True)], run.shape.micro)
    return answers


def _plain(run: work.Run, tokenizer: Any, policy: Any, reward_model: Any, prompts: list[list[int]], step: int) -> Any:
    torch.manual_seed(run.seed * 1000 + step)
    eos, pad, answers = tokenizer.eos_token_id, tokenizer.pad_token_id, []
    reward_model.config.pad_token_id = pad
    for start in range(0, len(prompts), run.shape.micro):
        ids, mask = left_pad(prompts[start : start + run.shape.micro], pad, policy.device)
        options = {"do_sample": True, "top_k": 0, "temperature": 1.0, "pad_token_id": pad, "eos_token_id": eos}
        out = policy.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=run.shape.response, **options)
        reward_model(input_ids=out, attention_mask=(out != pad).long())
        rows = out[:, ids.shape[1] :].tolist()
        answers += [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    return answers
