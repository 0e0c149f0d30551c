"""Updates that are skipped because numbers in them are not finite: reports, and the end of the run after too many."""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from rlhf.errors import UserError
from rlhf.file_types import Number, SkippedRow, SkippedUpdate

_HINTS = {
    "score": "check the rewards of these prompts",
    "gradient": "try a lower learning_rate or bounded rewards",
}

_SHOWN = 8  # ids in a printed line; skipped.jsonl has all


class Skips:
    """Reports each skipped update, and ends the run after `limit` of them in a row.

    All ranks make the same calls. After an update that is taken, the caller sets in_a_row to 0.
    write: gets a row of skipped.jsonl. of: "prompt" or "pair", for ids prompt_id or pair_id. hints: kind of number ->
    what may help.
    """

    def __init__(
        self,
        limit: int,
        write: Callable[[SkippedUpdate], None] = lambda row: None,
        of: str = "prompt",
        hints: Mapping[str, str] = _HINTS,
    ) -> None:
        self.limit, self.write, self.of, self.hints, self.in_a_row = limit, write, of, hints, 0

    def report(
        self,
        step: int,
        what: Sequence[str],
        rows: Sequence[SkippedRow],
        grad_norm: Number | list[Number] | None = None,
    ) -> None:
        """Report a skipped update. what: kinds of numbers that are not finite; rows: of all ranks, each with its id."""
        self.in_a_row += 1
        update: SkippedUpdate = {
            "step": step,
            "not_finite": list(what),
            "in_a_row": self.in_a_row,
            "rows": list(rows),
        }
        if grad_norm is not None:
            update["grad_norm"] = grad_norm
        self.write(update)
        if self.in_a_row < self.limit:
            return
        hint = self.hints["score" if "score" in what else "gradient"]
        raise UserError(
            f"update: {' and '.join(what)} not finite {self.in_a_row} times in a row, "
            f"last in step {step} with {names_of(rows, self.of)}; {hint}; earlier checkpoints are intact"
        )


def names_of(rows: Sequence[SkippedRow], of: str = "prompt") -> str:
    """Ids of prompts or pairs, with those scores that are not finite. No texts, which may contain anything."""

    def named(row: SkippedRow) -> str:
        name = row["pair_id"] if of == "pair" else row["prompt_id"]
        odd = [f"{source} {score}" for source, score in row.get("scores", {}).items() if isinstance(score, str)]
        return f"{name} ({', '.join(odd)})" if odd else name

    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"{of}s {', '.join(map(named, rows[:_SHOWN]))}{more}"


def skip_line(row: SkippedUpdate, of: str = "prompt") -> str:
    """The printed line for a row of skipped.jsonl."""
    what, rows = " and ".join(row["not_finite"]), names_of(row["rows"], of)
    return f"step {row['step']}: update skipped: {what} not finite, {rows}; see skipped.jsonl"


def json_number(x: Tensor | float) -> Number:
    """A number as JSON can hold it; nan and inf become words."""
    value = float(x)
    return value if math.isfinite(value) else str(value)
