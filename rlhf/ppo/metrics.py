"""One row a PPO step, under TRL's names, of numbers that no sharding changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.distributed.collectives import all_sum
from rlhf.functional.batching import to_device
from rlhf.functional.gae import wide, widest
from rlhf.functional.losses import kl_penalty
from rlhf.ppo.advantages import Targets, penalised_score, token_rewards
from rlhf.ppo.rollout import Rollout
from rlhf.ppo.work import FIELDS, Work, rates

_COUNTS = ("minibatches", "updates", "skipped")  # plain numbers, the same on all ranks
_NORMS = ("grad_norm", "grad_norm_critic")  # the same on all ranks: rank 0 sends them, so that they cost no wait
_LARGEST = "ratio_max"  # each rank sends its own in a place of its own, so that one sum serves it, too


def metrics_row(
    rollout: Rollout,
    targets: Targets,
    learned: dict[str, Any],
    kl_coef: float,
    args: PPOConfig,
    accelerator: Accelerator,
    rewards: Sequence[str],
    work: dict[str, Work],
) -> dict[str, float]:
    """Means over the responses, or the response tokens, of all ranks: ranks send sums and counts, once.

    rewards: the names of the reward sources. work: this rank's, by phase; speeds are those of all ranks together.
    """
    sums: dict[str, Tensor | float] = {**rollout_sums(rollout, rewards, args.kl_estimator)}
    sums |= _target_sums(rollout, targets, kl_coef, args) | _fingerprint_sums(rollout)
    sums |= {k: v for k, v in learned.items() if k not in (*_COUNTS, *_NORMS, _LARGEST)}
    sums |= {k: learned[k] if accelerator.process_index == 0 else 0.0 for k in _NORMS}
    places = [f"{_LARGEST}/{rank}" for rank in range(accelerator.num_processes)]
    sums |= dict.fromkeys(places, 0.0)
    sums[places[accelerator.process_index]] = learned[_LARGEST]
    sums |= {f"{phase}/{name}": getattr(one, name) for phase, one in work.items() for name in FIELDS}
    total = summed(sums, accelerator)
    together = {phase: Work(*(total[f"{phase}/{name}"] for name in FIELDS)) for phase in work}
    n, tokens, seen = max(total["n"], 1), max(total["response_tokens"], 1), max(total["tokens"], 1)
    minibatches = max(learned["minibatches"] - learned["skipped"], 1)
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
        "loss/policy_avg": total["loss/policy"] / minibatches,
        "loss/value_avg": total["loss/value"] / minibatches,
        "value/grad_norm": total["grad_norm_critic"],
        # 1 - Var(return - value) / Var(return): 1 is a perfect critic, 0 one that says the mean.
        "value/explained_variance": 1 - (_std(total, "value_errors", tokens) / (spread or 1)) ** 2,
        "val/clipfrac_avg": total["value_clipfrac"] / seen,
        "val/ratio": total["ratio"] / seen,
        "val/ratio_var": max(total["ratio_squared"] / seen - (total["ratio"] / seen) ** 2, 0),
        "val/ratio_max": max(total[place] for place in places),
        "val/num_eos_tokens": total["ended"],
        "val/updates": learned["updates"],
        "val/skipped_updates": learned["skipped"],
        "val/all_responses_same": float(total["n"] > 1 and _all_same(total)),
    }
    return row | rates(together, accelerator.num_processes)


def summed(sums: Mapping[str, Tensor | float], accelerator: Accelerator) -> dict[str, float]:
    """Each sum over all ranks: one collective, and the one wait of a step's metrics."""
    device = next(x.device for x in sums.values() if isinstance(x, Tensor))
    plain = [x for x in sums.values() if not isinstance(x, Tensor)]
    numbers = iter(to_device(torch.tensor(plain, dtype=widest(device)), device).unbind())
    # In the order of the names, which is the same on all ranks: which of them are plain numbers is not.
    values = torch.stack([wide(x) if isinstance(x, Tensor) else next(numbers) for x in sums.values()])
    return dict(zip(sums, all_sum(accelerator, values).tolist(), strict=True))


def rollout_sums(rollout: Rollout, rewards: Sequence[str], estimator: str) -> dict[str, Tensor]:
    """What this rank adds to the means of `rollout_means`, each float []."""
    real, mask = rollout.real, rollout.mask

    def over_tokens(x: Tensor) -> Tensor:
        return wide(torch.where(mask, x, 0)).sum()

    score = wide(torch.where(real, rollout.raw_score, 0))
    sums = {
        "n": real.sum(),
        "response_tokens": mask.sum(),
        "kl": over_tokens(kl_penalty(rollout.logp, rollout.ref_logp, estimator)),
        "kl_k1": over_tokens(kl_penalty(rollout.logp, rollout.ref_logp, "k1")),
        "kl_k3": over_tokens(kl_penalty(rollout.logp, rollout.ref_logp, "k3")),
        "kl_exact": over_tokens(rollout.exact_kl),
        "entropy_of_response": over_tokens(rollout.entropy),
        "score": score.sum(),
        "score_squared": (score**2).sum(),
        "ended": (rollout.ended & real).sum(),
    }
    for name, column in zip(rewards, rollout.scores.unbind(1), strict=True):
        known = real & ~column.isnan()
        column = wide(torch.where(known, column, 0))
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


def _target_sums(rollout: Rollout, targets: Targets, kl_coef: float, args: PPOConfig) -> dict[str, Tensor]:
    mask = rollout.mask
    sums = {
        "rlhf_reward": torch.where(mask, token_rewards(rollout, kl_coef, args), 0).sum(),
        "penalised_score": torch.where(rollout.real, penalised_score(rollout, args.missing_eos_penalty), 0).sum(),
        "values": torch.where(mask, rollout.values, 0).sum(),
    }
    per_token = {
        "advantages": targets.raw_advantages,
        "returns": targets.returns,
        "value_errors": targets.returns - rollout.values,
    }
    for name, x in per_token.items():
        x = wide(torch.where(mask, x, 0))
        sums |= {name: x.sum(), f"{name}_squared": (x**2).sum()}
    return sums


def _fingerprint_sums(rollout: Rollout) -> dict[str, Tensor]:
    """Sum and sum of squares of a 20-bit number a response, which depends on its tokens and nothing else.

    Doubles hold both exactly for 4096 responses.
    """
    response = rollout.ids[:, -rollout.mask.shape[1] :].long() * rollout.mask
    place = torch.arange(1, response.shape[1] + 1, device=response.device)
    # Products wrap alike everywhere. A token and its place are mixed, so that an order counts, too.
    mixed = (response + 1) * rollout.mask * (place * 2_654_435_761 + 40_503)
    number = wide((mixed ^ (mixed >> 15)).sum(1) % 2**20) * rollout.real
    return {"fingerprint": number.sum(), "fingerprint_squared": (number**2).sum()}


def _all_same(total: dict[str, float]) -> bool:
    """Cauchy-Schwarz: n times the sum of squares is the square of the sum where all are the same, and only there."""
    return int(total["n"]) * int(total["fingerprint_squared"]) == int(total["fingerprint"]) ** 2


def _std(total: dict[str, float], name: str, n: float) -> float:
    return max(total[f"{name}_squared"] / n - (total[name] / n) ** 2, 0) ** 0.5
