"""Updates that were left out because numbers in them were not finite: who hears of it, and when the run ends."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from rlhf.errors import UserError
from rlhf.file_types import Number, SkippedRow, SkippedUpdate

_HINTS = {
    "score": "look at what the reward says to these prompts",
    "gradient": "a lower learning_rate or rewards within bounds may help",
}

_SHOWN = 8  # ids in a printed line; skipped.jsonl has all


class Skips:
    """Says and writes each update that was left out, and ends the run once there were too many in a row.

    All ranks make the same calls; `write` gets a row of skipped.jsonl. Who takes an update sets in_a_row to 0.
    of: what the rows are, by their id: prompt_id, pair_id; hints: what may help, by the kind of number.
    """

    def __init__(
        self,
        limit: int,
        write: Callable[[SkippedUpdate], None] = lambda row: None,
        of: str = "prompt",
        hints: Mapping[str, str] = _HINTS,
    ) -> None:
        self.limit, self.write, self.of, self.hints, self.in_a_row = limit, write, of, hints, 0

    def left_out(
        self,
        step: int,
        what: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        grad_norm: Number | list[Number] | None = None,
    ) -> None:
        """An update was not. what: the kinds of numbers; rows: of all ranks, each with its id."""
        self.in_a_row += 1
        update: SkippedUpdate = {
            "step": step,
            "not_finite": list(what),
            "in_a_row": self.in_a_row,
            "rows": cast(list[SkippedRow], list(rows)),
        }
        if grad_norm is not None:
            update["grad_norm"] = grad_norm
        self.write(update)
        if self.in_a_row < self.limit:
            return
        hint = self.hints["score" if "score" in what else "gradient"]
        raise UserError(
            f"update: expected finite numbers, found {' and '.join(what)} not finite {self.in_a_row} times in a row, "
            f"last in step {step} with {names_of(rows, self.of)}; {hint}; what was saved before is whole"
        )


def names_of(rows: Sequence[Mapping[str, Any]], of: str = "prompt") -> str:
    """Which prompts or pairs, by id since texts may be anything, and which scores of theirs are no numbers."""

    def named(row: Mapping[str, Any]) -> str:
        odd = [f"{name} {score}" for name, score in row.get("scores", {}).items() if isinstance(score, str)]
        return f"{row[f'{of}_id']} ({', '.join(odd)})" if odd else str(row[f"{of}_id"])

    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"{of}s {', '.join(map(named, rows[:_SHOWN]))}{more}"


def skip_line(row: SkippedUpdate, of: str = "prompt") -> str:
    """A row of skipped.jsonl in words."""
    what, rows = " and ".join(row["not_finite"]), names_of(row["rows"], of)
    return f"step {row['step']}: an update was left out, {what} not finite, {rows}; see skipped.jsonl"


def json_number(x: Tensor | float) -> Number:
    """As JSON can say it: nan and inf are words."""
    value = float(x)
    return value if math.isfinite(value) else str(value)
