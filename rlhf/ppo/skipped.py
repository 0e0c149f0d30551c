"""Numbers that are not finite: which rows of a rollout they came with, and what skipped.jsonl says of those."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf.ppo.rollout import Rollout, Targets
from rlhf.runtime.skips import number


def not_finite(rollout: Rollout) -> dict[str, Tensor]:
    """What learning would read -> bool [B], True on rows where it is not finite; never on filler rows."""

    def on_tokens(x: Tensor) -> Tensor:
        return (~x.isfinite() & rollout.mask).any(1)

    return {
        "score": ~rollout.raw_score.isfinite() & rollout.real,
        "log-prob": on_tokens(rollout.logp),
        "reference's log-prob": on_tokens(rollout.ref_logp),
        "value": on_tokens(rollout.values) | (~rollout.last_value.isfinite() & rollout.real),
    }


def set_aside(rollout: Rollout, rows: Tensor) -> Rollout:
    """The rollout with some rows, bool [B], counting for nothing, as filler rows do."""
    return replace(rollout, real=rollout.real & ~rows, mask=rollout.mask & ~rows.unsqueeze(1))


def broken_rows(
    rollout: Rollout, bad: dict[str, Tensor], prompt_ids: Sequence[str], rewards: Sequence[str]
) -> list[dict[str, Any]]:
    """This rank's rows of which something is not finite, with what that is and every reward's score."""
    rows = []
    for i in torch.stack(list(bad.values())).any(0).nonzero().flatten().tolist():
        scores = dict(zip(rewards, map(number, rollout.scores[i]), strict=True))
        what = [name for name, where in bad.items() if where[i]]
        rows.append(facts(rollout, i, prompt_ids) | {"not_finite": what, "scores": scores})
    return rows


def update_rows(
    rollout: Rollout, targets: Targets, groups: Sequence[Sequence[int]], losses: Tensor, prompt_ids: Sequence[str]
) -> list[dict[str, Any]]:
    """This rank's rows of an optimizer step. losses: [len(groups), 2], policy and value, of each micro-batch."""
    rows = []
    for index, (policy, value) in zip(groups, losses.tolist(), strict=True):
        for i in index:
            aims = {"advantage": targets.advantages[i], "return": targets.returns[i]}
            largest = {name: number(x.abs().max()) for name, x in aims.items()}
            loss = {"policy_loss": number(policy), "value_loss": number(value)}  # of its micro-batch
            rows.append(facts(rollout, i, prompt_ids) | largest | loss)
    return rows


def facts(rollout: Rollout, i: int, prompt_ids: Sequence[str]) -> dict[str, Any]:
    """A row's prompt id, lengths and numbers; log-probs are sums over the response, nats. No texts."""
    mask = rollout.mask[i]
    width = rollout.attention.shape[1] - mask.shape[0]
    return {
        "prompt_id": prompt_ids[i] if prompt_ids else str(i),
        "prompt_tokens": int(rollout.attention[i, :width].sum()),
        "response_tokens": int(mask.sum()),
        "score": number(rollout.raw_score[i]),
        "logp": number(rollout.logp[i][mask].sum()),
        "ref_logp": number(rollout.ref_logp[i][mask].sum()),
        "values": number(rollout.values[i][mask].sum()),
    }
