"""The steps of a stage on the console, as callbacks of the trainers."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.console.steps import ROWS, Pace, Steps
from rlhf.console.words import percent, plain


class _Rows(TrainerCallback):
    """A bar, and rows under these columns."""

    columns: Sequence[str]
    steps: Steps

    def __init__(self, rows: int = ROWS) -> None:
        """rows: about so many; 0 for none."""
        self.rows = rows

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show the bar."""
        self.steps = Steps(self.columns, state.max_steps, state.global_step, self.rows)
        self.steps.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        self.steps.step(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Show a row of metrics."""
        cells = self.cells(state, logs or {})
        if cells:
            self.steps.row(state.global_step, [str(state.global_step), *cells])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the bar away."""
        self.steps.close()

    def cells(self, state: TrainerState, row: dict[str, float]) -> list[str]:
        """Of a logged row, after the step; none for a row that is not shown."""
        raise NotImplementedError


class PPORows(_Rows):
    """A row of the console per PPO step."""

    columns = ("step", "  score ± se", "KL/token", "length", "ended", "   s", " left")
    pace: Pace | None = None

    def cells(self, state: TrainerState, row: dict[str, float]) -> list[str]:
        """Score with its standard error, KL, length, share of ended responses, seconds, time left."""
        if "objective/scores" not in row:
            return []
        self.pace = self.pace or Pace(state.max_steps)
        seconds = sum(value for name, value in row.items() if name.startswith("time/"))
        error = row["objective/scores_std"] / math.sqrt(max(1.0, row["eps"] * seconds))
        return [
            f"{plain(row['objective/scores'])} ± {error:.2f}",
            plain(row["objective/kl_per_token"], 3),
            f"{row['objective/response_length']:.1f}",
            percent(row["objective/eos_rate"]),
            f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}",
            self.pace.left(state.global_step, seconds),
        ]


class RewardRows(_Rows):
    """A row of the console per evaluation of the reward model, with what training has logged last."""

    columns = ("step", "train loss", "  acc", "val loss", "  acc")
    train: Mapping[str, float] = MappingProxyType({})

    def cells(self, state: TrainerState, row: dict[str, float]) -> list[str]:
        """Loss and accuracy in training, then on the validation pairs."""
        if "loss" in row:
            self.train = row
        if "eval_loss" not in row:
            return []
        cells = []
        for source, start in ((self.train, ""), (row, "eval_")):
            loss, right = (source.get(start + name) for name in ("loss", "accuracy"))
            cells += ["–" if loss is None else f"{loss:.3f}", "–" if right is None else percent(right)]
        return cells
