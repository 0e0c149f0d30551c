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
from rlhf.ppo.rollout import RolloutCollector

# The step of the sampling streams (seed, step, prompt). PPO counts from 1. Each evaluation gets the same random
# numbers, so that two of them differ because of the policy and not by luck.
STEP = 0
GREEDY = 0.01  # TRL's temperature for the table of completions
_NONFINITE = "not_finite"


def evaluate(collector: RolloutCollector, prompts: Sequence[Prompt], prefix: str) -> dict[str, float]:
    """Means over the whole set, each prompt once, as `prefix/scores`, `prefix/kl_per_token` and so on.

    Responses with a score, log-prob or value that is not finite are not in them; `prefix/not_finite` counts these.
    """
    names = [source.name for source in collector.rewards]
    total: dict[str, Tensor] = {}
    shard = Shard.of_rank(len(prompts), collector.accelerator)
    for part, is_valid in _batches(collector, shard, prompts):
        rollout = collector.complete(part, collector.sample(part, STEP), shard, is_valid)
        nonfinite = torch.stack(list(rollout.nonfinite.values())).any(0)
        sums = rollout_sums(rollout, collector.args.kl_estimator)
        for name, value in (sums | {_NONFINITE: nonfinite.sum()}).items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + value.cpu().double()
    device = collector.accelerator.device
    whole = summed({k: v.to(device, widest(device)) for k, v in total.items()}, collector.accelerator)
    means = rollout_means(whole, names) | {_NONFINITE: whole[_NONFINITE]}
    return {f"{prefix}/{name.removeprefix('objective/')}": value for name, value in means.items()}


def completions(collector: RolloutCollector, prompts: Sequence[Prompt], one_batch: bool) -> list[Completion]:
    """Rows (prompt_id, prompt, response, score) at a temperature near 0, on every rank all of them, in order."""
    prompts = (
        prompts[: collector.args.per_device_eval_batch_size * collector.accelerator.num_processes]
        if one_batch
        else prompts
    )
    rows: list[Completion] = []
    shard = Shard.of_rank(len(prompts), collector.accelerator)
    for part, is_valid in _batches(collector, shard, prompts):
        samples = collector.sample(part, STEP, GREEDY)
        scores = collector.complete(part, samples, shard, is_valid).raw_score.tolist()
        for prompt, response, score, valid in zip(part, samples.responses, scores, is_valid.tolist(), strict=True):
            if valid:
                text = decode_response(collector.tokenizer, response)
                rows.append({"prompt_id": prompt.prompt_id, "prompt": prompt.text, "response": text, "score": score})
    return shard.gather(rows)


def _batches(
    collector: RolloutCollector, shard: Shard, prompts: Sequence[Prompt]
) -> Iterator[tuple[list[Prompt], Tensor]]:
    mine, is_valid = shard.of(prompts), shard.is_valid
    size = collector.args.per_device_eval_batch_size
    for start in range(0, len(mine), size):
        yield mine[start : start + size], is_valid[start : start + size]
