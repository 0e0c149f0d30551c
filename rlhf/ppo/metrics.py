"""One row a PPO step, under TRL's names, of numbers that no sharding changes."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.functional.kl import kl_penalty
from rlhf.ppo.rollout import Rollout, Targets, penalised_score, token_rewards
from rlhf.runtime.distributed import all_sum


def metrics_row(
    rollout: Rollout,
    targets: Targets,
    learned: dict[str, Tensor],
    kl_coef: float,
    args: PPOConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Means over the responses, or the response tokens, of all ranks: ranks send sums and counts, once."""
    sums = _rollout_sums(rollout, targets, kl_coef, args) | {k: v for k, v in learned.items() if "norm" not in k}
    names = list(sums)
    total = dict(zip(names, all_sum(accelerator, torch.stack([sums[n].double() for n in names])).tolist(), strict=True))
    n, tokens, seen = total["n"], max(total["response_tokens"], 1), max(total["tokens"], 1)
    updates = args.num_ppo_epochs * min(args.num_mini_batches, n)
    ratio = total["ratio"] / seen
    return {
        "objective/kl": total["kl"] / n,
        "objective/kl_per_token": total["kl"] / tokens,
        "objective/kl_coef": kl_coef,
        "objective/entropy": total["entropy_of_response"] / n,
        "objective/non_score_reward": total["non_score_reward"] / n,
        "objective/rlhf_reward": total["rlhf_reward"] / n,
        "objective/scores": total["score"] / n,
        "objective/scores_std": max(total["score_squared"] / n - (total["score"] / n) ** 2, 0) ** 0.5,
        "objective/penalised_scores": total["penalised_score"] / n,
        "objective/response_length": tokens / n,
        "objective/eos_rate": total["ended"] / n,
        "objective/returns": total["returns"] / tokens,
        "objective/values": total["values"] / tokens,
        "policy/approxkl_avg": total["approxkl"] / seen,
        "policy/clipfrac_avg": total["clipfrac"] / seen,
        "policy/entropy_avg": total["entropy"] / seen,
        "policy/grad_norm": learned["grad_norm"].item(),
        "loss/policy_avg": total["loss/policy"] / updates,
        "loss/value_avg": total["loss/value"] / updates,
        "value/grad_norm": learned["grad_norm_critic"].item(),
        "val/clipfrac_avg": total["value_clipfrac"] / seen,
        "val/ratio": ratio,
        "val/ratio_var": max(total["ratio_squared"] / seen - ratio**2, 0),
        "val/num_eos_tokens": total["ended"],
    }


def _rollout_sums(rollout: Rollout, targets: Targets, kl_coef: float, args: PPOConfig) -> dict[str, Tensor]:
    real, mask = rollout.real, rollout.mask
    kl = torch.where(mask, kl_penalty(rollout.logp, rollout.ref_logp, args.kl_estimator), 0).sum()
    score = rollout.score * real
    penalised = penalised_score(rollout, args.missing_eos_penalty) * real
    return {
        "n": real.sum(),
        "response_tokens": mask.sum(),
        "kl": kl,
        "entropy_of_response": torch.where(mask, rollout.entropy, 0).sum(),
        "non_score_reward": -kl_coef * kl,
        "rlhf_reward": token_rewards(rollout, kl_coef, args).sum(),
        "score": score.sum(),
        "score_squared": (score.double() ** 2).sum(),
        "penalised_score": penalised.sum(),
        "ended": (rollout.ended & real).sum(),
        "returns": torch.where(mask, targets.returns, 0).sum(),
        "values": torch.where(mask, rollout.values, 0).sum(),
    }


def parameter_lines(models: list[dict[str, Any]]) -> list[str]:
    """What is trained, one line a role: parameters, trainable ones and their share."""
    return [
        f"{row['role']:>9}: {row['name']}, {row['parameters']:,} parameters, {row['trainable']:,} trained"
        + (f" ({row['trainable'] / row['parameters']:.2%})" if row["parameters"] else "")
        for row in models
    ]
