"""Numbers that are not finite: which rows they came with, what is left out, and when the run ends."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.ppo.rollout import Rollout, Targets

_HINTS = {
    "score": "look at what the reward says to these prompts",
    "gradient": "a lower learning_rate or rewards within bounds may help",
}
_SHOWN = 8  # prompt ids in a printed line; skipped.jsonl has all


class Skips:
    """Says and writes each update that was left out, and ends the run once there were too many in a row.

    All ranks make the same calls; `write` gets a row of skipped.jsonl. Who takes an update sets in_a_row to 0.
    """

    def __init__(self, limit: int, write: Callable[[dict[str, Any]], None] = lambda row: None) -> None:
        self.limit, self.write, self.in_a_row = limit, write, 0

    def left_out(self, step: int, what: Sequence[str], rows: Sequence[dict[str, Any]], **more: Any) -> None:
        """An update was not. what: the kinds of numbers; rows: of all ranks, as `facts` has them."""
        self.in_a_row += 1
        self.write({"step": step, "not_finite": list(what), "in_a_row": self.in_a_row, **more, "rows": list(rows)})
        if self.in_a_row < self.limit:
            return
        hint = _HINTS["score" if "score" in what else "gradient"]
        raise UserError(
            f"update: expected finite numbers, found {' and '.join(what)} not finite {self.in_a_row} times in a row, "
            f"last in step {step} with {prompts_of(rows)}; {hint}; what was saved before is whole"
        )


def prompts_of(rows: Sequence[dict[str, Any]]) -> str:
    """Which prompts, by id since texts may be anything, and which scores of theirs are no numbers."""

    def named(row: dict[str, Any]) -> str:
        odd = [f"{name} {score}" for name, score in row.get("scores", {}).items() if isinstance(score, str)]
        return f"{row['prompt_id']} ({', '.join(odd)})" if odd else str(row["prompt_id"])

    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"prompts {', '.join(map(named, rows[:_SHOWN]))}{more}"


def line(row: dict[str, Any]) -> str:
    """A row of skipped.jsonl in words."""
    what, rows = " and ".join(row["not_finite"]), prompts_of(row["rows"])
    return f"step {row['step']}: an update was left out, {what} not finite, {rows}; see skipped.jsonl"


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
    rollout: Rollout, targets: Targets, groups: Sequence[Tensor], losses: Tensor, prompt_ids: Sequence[str]
) -> list[dict[str, Any]]:
    """This rank's rows of an optimizer step. losses: [len(groups), 2], policy and value, of each micro-batch."""
    rows = []
    for index, (policy, value) in zip(groups, losses.tolist(), strict=True):
        for i in index.tolist():
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


def number(x: Tensor | float) -> float | str:
    """As JSON can say it: nan and inf are words."""
    value = float(x)
    return value if math.isfinite(value) else str(value)
