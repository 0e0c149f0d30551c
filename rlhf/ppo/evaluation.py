"""Evaluation while PPO runs: the policy on prompts that it does not learn from."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from rlhf.distributed.collectives import Shard
from rlhf.errors import UserError, did_you_mean
from rlhf.file_types import Completion
from rlhf.functional.gae import widest
from rlhf.ppo.metrics import logged_means, rollout_means, rollout_sums, summed
from rlhf.ppo.prompts import Prompt
from rlhf.ppo.rollout import Rollout, RolloutCollector
from rlhf.reward.calls import Logged

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
    logged: list[Logged] = []
    shard = Shard.of_rank(len(prompts), collector.accelerator)
    for part, is_valid in _batches(collector, shard, prompts):
        rollout = collector.complete(part, collector.sample(part, STEP), shard, is_valid)
        nonfinite = torch.stack(list(rollout.nonfinite.values())).any(0)
        logged.append(rollout.logged)
        sums = rollout_sums(rollout, collector.args.kl_estimator)
        sums |= {_NONFINITE: nonfinite.sum(), "logged": torch.tensor(len(rollout.logged.metrics))}
        for name, value in sums.items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + value.cpu().double()
    device = collector.accelerator.device
    whole = summed({k: v.to(device, widest(device)) for k, v in total.items()}, collector.accelerator)
    means = logged_means(whole["logged"], logged) | rollout_means(whole, names) | {_NONFINITE: whole[_NONFINITE]}
    means["rlhf_reward"] = means["objective/scores"] - collector.args.kl_coef * means["objective/kl"]
    return {f"{prefix}/{name.removeprefix('objective/')}": value for name, value in means.items()}


def metric_named(wanted: str, metrics: Mapping[str, float]) -> float:
    """The metric that metric_for_best_model means: eval_scores or scores is eval/scores. A UserError for no metric."""
    names = {name.replace("/", "_"): value for name, value in metrics.items()}
    for name in (wanted.replace("/", "_"), f"eval_{wanted.replace('/', '_')}"):
        if name in names:
            return names[name]
    raise UserError(
        f"metric_for_best_model: expected one of {', '.join(names)}, found {wanted!r}{did_you_mean(wanted, names)}"
    )


def check_metric(wanted: str | None, rewards: Sequence[str], sets: Iterable[str]) -> None:
    """A UserError for a metric that no evaluation will have. rewards: names; sets: those of several, or "" for one."""
    means = rollout_means(defaultdict(float), rewards).keys() | {"rlhf_reward", _NONFINITE}
    prefixes = [f"eval_{name}" if name else "eval" for name in sets]
    if wanted is not None:
        known = sorted(f"{prefix}/{name.removeprefix('objective/')}" for prefix in prefixes for name in means)
        metric_named(wanted, dict.fromkeys(known, 0.0))


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
        rollout = collector.complete(part, samples, shard, is_valid)
        rows += sample_rows(rollout, collector.text, int(is_valid.sum()))
    return shard.gather(rows)


def sample_rows(rollout: Rollout, text_of: Callable[[list[int]], str], count: int) -> list[Completion]:
    """The first `count` prompts of a rollout, with what was answered and what reward functions say of it."""
    scores = rollout.raw_score[:count].tolist()
    rows = []
    for i, (prompt, response, score) in enumerate(zip(rollout.prompts, rollout.responses, scores, strict=False)):
        text = text_of(response)
        row = {"prompt_id": prompt.prompt_id, "prompt": prompt.text, "response": text, "score": score}
        rows.append(cast(Completion, rollout.logged.row(i) | row))
    return rows


def _batches(
    collector: RolloutCollector, shard: Shard, prompts: Sequence[Prompt]
) -> Iterator[tuple[list[Prompt], Tensor]]:
    mine, is_valid = shard.of(prompts), shard.is_valid
    size = collector.args.per_device_eval_batch_size
    for start in range(0, len(mine), size):
        yield mine[start : start + size], is_valid[start : start + size]
