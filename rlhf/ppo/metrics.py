"""One row of metrics per PPO step, under TRL's names; the numbers do not depend on the sharding."""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.distributed.collectives import all_rows, all_sum
from rlhf.functional.batching import to_device
from rlhf.functional.gae import widest
from rlhf.functional.losses import kl_penalty
from rlhf.perf.work import FIELDS, Work, rates
from rlhf.ppo.advantages import Advantages
from rlhf.ppo.learner import Update
from rlhf.ppo.rollout import Rollout
from rlhf.reward.calls import Logged


def metrics_row(
    rollout: Rollout,
    advantages: Advantages,
    update: Update,
    kl_coef: float,
    args: PPOConfig,
    accelerator: Accelerator,
    work: dict[str, Work],
) -> dict[str, float]:
    """Means over the responses, or the response tokens, of all ranks: ranks send sums and counts, once.

    work: this rank's, by phase; speeds are those of all ranks together.
    """
    rewards, rank = rollout.reward_names, accelerator.process_index
    sums: dict[str, Tensor | float] = {**rollout_sums(rollout, args.kl_estimator)}
    sums |= _advantage_sums(rollout, advantages) | _fingerprint_sums(rollout)
    sums |= {**update.statistics._asdict(), "tokens": update.tokens}
    sums["logged"] = float(len(rollout.logged.metrics))
    # The same on all ranks: only rank 0 sends them, so that they ride along with the sums.
    norms: list[Tensor | float] = [*update.norms.unbind()] if rank == 0 else [0.0, 0.0]
    sums |= dict(zip(("grad_norm", "grad_norm_critic"), norms, strict=True))
    # A maximum: each rank sends its own in its own place, so that one sum serves it, too.
    places = [f"ratio_max/{place}" for place in range(accelerator.num_processes)]
    sums |= dict.fromkeys(places, 0.0) | {places[rank]: update.ratio_max}
    sums |= {f"{phase}/{name}": getattr(one, name) for phase, one in work.items() for name in FIELDS}
    total = summed(sums, accelerator)
    together = {phase: Work(*(total[f"{phase}/{name}"] for name in FIELDS)) for phase in work}
    n, tokens, seen = max(total["n"], 1), max(total["response_tokens"], 1), max(total["tokens"], 1)
    minibatches = max(update.minibatches - update.skipped, 1)
    spread = _std(total, "returns", tokens)
    row = rollout_means(total, rewards) | {
        "objective/kl_coef": kl_coef,
        "objective/non_score_reward": -kl_coef * total["kl"] / n,
        "objective/rlhf_reward": total["rlhf_reward"] / n,
        "objective/penalised_scores": total["penalised_score"] / n,
        "objective/advantages": total["advantages"] / tokens,
        "objective/advantages_std": _std(total, "advantages", tokens),
        "objective/returns": total["returns"] / tokens,
        "objective/returns_std": spread,
        "objective/values": total["values"] / tokens,
        "policy/approxkl_avg": total["approxkl"] / seen,
        "policy/clipfrac_avg": total["clipfrac"] / seen,
        "policy/entropy_avg": total["entropy"] / seen,
        "policy/grad_norm": total["grad_norm"],
        "loss/policy_avg": total["policy_loss"] / minibatches,
        "loss/value_avg": total["value_loss"] / minibatches,
        "value/grad_norm": total["grad_norm_critic"],
        # 1 - Var(return - value) / Var(return): 1 is a perfect critic, 0 one that predicts the mean.
        "value/explained_variance": 1 - (_std(total, "value_errors", tokens) / (spread or 1)) ** 2,
        "val/clipfrac_avg": total["value_clipfrac"] / seen,
        "val/ratio": total["ratio"] / seen,
        "val/ratio_var": max(total["ratio_squared"] / seen - (total["ratio"] / seen) ** 2, 0),
        "val/ratio_max": max(total[place] for place in places),
        "val/num_eos_tokens": total["ended"],
        "val/updates": float(update.updates),
        "val/skipped_updates": float(update.skipped),
        "val/all_responses_same": float(total["n"] > 1 and _all_same(total)),
    }
    return logged_means(total["logged"], [rollout.logged]) | row | rates(together, accelerator.num_processes)


def logged_means(count: float, logged: Sequence[Logged]) -> dict[str, float]:
    """Means over batches and ranks of the metrics that reward functions log: a collective, if any rank has one.

    count: of these metrics, summed over ranks.
    """
    found: dict[str, list[float]] = {}
    for metrics in all_rows([one.metrics for one in logged]) if count else []:
        for name, values in metrics.items():
            found.setdefault(name, []).extend(values)
    return {name: sum(values) / len(values) for name, values in found.items()}


def summed(sums: Mapping[str, Tensor | float], accelerator: Accelerator) -> dict[str, float]:
    """Each sum over all ranks: one collective, and the one wait of a step's metrics."""
    device = next(x.device for x in sums.values() if isinstance(x, Tensor))
    plain = [x for x in sums.values() if not isinstance(x, Tensor)]
    numbers = iter(to_device(torch.tensor(plain, dtype=widest(device)), device).unbind())
    # In the order of the names, which is the same on all ranks.
    values = torch.stack([x.to(widest(device)) if isinstance(x, Tensor) else next(numbers) for x in sums.values()])
    return dict(zip(sums, all_sum(accelerator, values).tolist(), strict=True))


def rollout_sums(rollout: Rollout, estimator: str) -> dict[str, Tensor]:
    """What this rank adds to the means of `rollout_means`, each float []."""
    is_valid, mask = rollout.is_valid, rollout.mask
    float64 = widest(mask.device)

    def over_tokens(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).to(float64).sum()

    kl = {name: over_tokens(kl_penalty(rollout.logp, rollout.ref_logp, name)) for name in ("k1", "k3")}
    score = torch.where(is_valid, rollout.raw_score, 0).to(float64)
    sums = {
        "n": is_valid.sum(),
        "response_tokens": mask.sum(),
        "kl": kl[estimator],
        "kl_k1": kl["k1"],
        "kl_k3": kl["k3"],
        "kl_exact": over_tokens(rollout.exact_kl),
        "entropy_of_response": over_tokens(rollout.entropy),
        "score": score.sum(),
        "score_squared": (score**2).sum(),
        "ended": (rollout.ended & is_valid).sum(),
    }
    for name, column in zip(rollout.reward_names, rollout.scores.unbind(1), strict=True):
        known = is_valid & ~column.isnan()
        column = torch.where(known, column, 0).to(float64)
        sums |= {f"{name}/n": known.sum(), f"{name}/sum": column.sum(), f"{name}/sum_squared": (column**2).sum()}
    return sums


def rollout_means(total: dict[str, float], rewards: Sequence[str]) -> dict[str, float]:
    """Sums over all ranks -> means over responses or, for `_per_token`, over response tokens."""
    n, tokens = max(total["n"], 1), max(total["response_tokens"], 1)
    row = {
        "objective/kl": total["kl"] / n,
        "objective/kl_per_token": total["kl"] / tokens,
        "objective/kl_k1_per_token": total["kl_k1"] / tokens,
        "objective/kl_k3_per_token": total["kl_k3"] / tokens,
        "objective/kl_exact_per_token": total["kl_exact"] / tokens,
        "objective/entropy": total["entropy_of_response"] / n,
        "objective/scores": total["score"] / n,
        "objective/scores_std": max(total["score_squared"] / n - (total["score"] / n) ** 2, 0) ** 0.5,
        "objective/response_length": total["response_tokens"] / n,
        "objective/eos_rate": total["ended"] / n,
    }
    for name in rewards:
        known = max(total[f"{name}/n"], 1)
        mean = total[f"{name}/sum"] / known
        row[f"rewards/{name}/mean"] = mean
        row[f"rewards/{name}/std"] = max(total[f"{name}/sum_squared"] / known - mean**2, 0) ** 0.5
    return row


def _advantage_sums(rollout: Rollout, advantages: Advantages) -> dict[str, Tensor]:
    mask = rollout.mask
    sums = {
        "rlhf_reward": torch.where(mask, advantages.rewards, 0).sum(),
        "penalised_score": torch.where(rollout.is_valid, advantages.score, 0).sum(),
        "values": torch.where(mask, rollout.values, 0).sum(),
    }
    per_token = {
        "advantages": advantages.raw_advantages,
        "returns": advantages.returns,
        "value_errors": advantages.returns - rollout.values,
    }
    for name, x in per_token.items():
        x = torch.where(mask, x, 0).to(widest(mask.device))
        sums |= {name: x.sum(), f"{name}_squared": (x**2).sum()}
    return sums


def _fingerprint_sums(rollout: Rollout) -> dict[str, Tensor]:
    """Sum and sum of squares of one 20-bit hash per response, which depends on its tokens only.

    Doubles hold both exactly for 4096 responses.
    """
    response = rollout.ids[:, -rollout.mask.shape[1] :].long() * rollout.mask
    place = torch.arange(1, response.shape[1] + 1, device=response.device)
    # Integer products wrap the same way everywhere. Token and position are mixed, so that order counts.
    mixed = (response + 1) * rollout.mask * (place * 2_654_435_761 + 40_503)
    number = ((mixed ^ (mixed >> 15)).sum(1) % 2**20).to(widest(mixed.device)) * rollout.is_valid
    return {"fingerprint": number.sum(), "fingerprint_squared": (number**2).sum()}


def _all_same(total: dict[str, float]) -> bool:
    """Cauchy-Schwarz: n times the sum of squares equals the square of the sum only if all are the same."""
    return int(total["n"]) * int(total["fingerprint_squared"]) == int(total["fingerprint"]) ** 2


def _std(total: dict[str, float], name: str, n: float) -> float:
    return max(total[f"{name}_squared"] / n - (total[name] / n) ** 2, 0) ** 0.5
