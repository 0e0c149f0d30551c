"""Evaluation while PPO runs: the policy on prompts that it does not learn from."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlhf.data.chat import decode_response
from rlhf.distributed.collectives import Shard
from rlhf.file_types import Completion
from rlhf.functional.gae import widest
from rlhf.ppo.metrics import rollout_means, rollout_sums, summed
from rlhf.ppo.prompts import Prompt
from rlhf.ppo.rollout import Actor, not_finite, set_aside

# Of the sampling streams' (seed, step, prompt): PPO's steps count from 1. Each evaluation gets the same random
# numbers, so that two of them differ by the policy and not by luck.
STEP = 0
GREEDY = 0.01  # TRL's temperature for the table of completions
_BROKEN = "not_finite"


def evaluate(actor: Actor, prompts: Sequence[Prompt], prefix: str) -> dict[str, float]:
    """Means over the whole set, each prompt once, as `prefix/scores`, `prefix/kl_per_token` and so on.

    Responses with a score, log-prob or value that is not finite are not in them; `prefix/not_finite` counts these.
    """
    names = [source.name for source in actor.rewards]
    total: dict[str, Tensor] = {}
    shard = Shard.of_rank(len(prompts), actor.accelerator)
    for part, real in _batches(actor, shard, prompts):
        rollout = actor.rollout(part, actor.sample(part, STEP), real)
        broken = torch.stack(list(not_finite(rollout).values())).any(0)
        sums = rollout_sums(set_aside(rollout, broken), names, actor.args.kl_estimator)
        for name, value in (sums | {_BROKEN: broken.sum()}).items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + value.cpu().double()
    device = actor.accelerator.device
    whole = summed({k: v.to(device, widest(device)) for k, v in total.items()}, actor.accelerator)
    means = rollout_means(whole, names) | {_BROKEN: whole[_BROKEN]}
    return {f"{prefix}/{name.removeprefix('objective/')}": value for name, value in means.items()}


def completions(actor: Actor, prompts: Sequence[Prompt], one_batch: bool) -> list[Completion]:
    """Rows (prompt_id, prompt, response, score) at a temperature near 0, on every rank all of them, in order."""
    prompts = (
        prompts[: actor.args.per_device_eval_batch_size * actor.accelerator.num_processes] if one_batch else prompts
    )
    rows: list[Completion] = []
    shard = Shard.of_rank(len(prompts), actor.accelerator)
    for part, real in _batches(actor, shard, prompts):
        responses = actor.sample(part, STEP, GREEDY)
        scores = actor.rollout(part, responses, real).raw_score.tolist()
        for prompt, response, score, is_real in zip(part, responses, scores, real.tolist(), strict=True):
            if is_real:
                text = decode_response(actor.tokenizer, response)
                rows.append({"prompt_id": prompt.prompt_id, "prompt": prompt.text, "response": text, "score": score})
    return shard.gather(rows)


def _batches(actor: Actor, shard: Shard, prompts: Sequence[Prompt]) -> Iterator[tuple[list[Prompt], Tensor]]:
    mine, is_valid = shard.of(prompts), shard.is_valid
    size = actor.args.per_device_eval_batch_size
    for start in range(0, len(mine), size):
        yield mine[start : start + size], is_valid[start : start + size]
