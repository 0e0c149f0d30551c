"""Updates of the reward model whose loss or gradient is not finite: skipped on all ranks together, and written down."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.config import RewardStageConfig
from rlhf.console import screen
from rlhf.distributed.collectives import all_rows, all_sum, gradient_norm
from rlhf.distributed.launch import is_deepspeed
from rlhf.distributed.sharding import step_taken
from rlhf.file_types import SkippedRow, SkippedUpdate
from rlhf.functional.gae import wide
from rlhf.tracking.skipped_updates import Skips, json_number

_HINTS = {"gradient": "look at these pairs; a lower learning_rate may help"}


def pair_skips(args: RewardStageConfig, write: Callable[[SkippedUpdate], None] = lambda row: None) -> Skips:
    """Counts and writes skipped updates on pairs."""
    return Skips(args.max_skipped_updates, write, "pair", _HINTS)


@dataclass
class Losses:
    """Sums of the loss over updates taken, in the whole run and since the last logged row; the same on all ranks."""

    run: float = 0.0
    run_updates: int = 0
    recent: float = 0.0
    recent_updates: int = 0
    recent_skipped: int = 0

    def __post_init__(self) -> None:  # the values may come from a file
        self.run, self.recent = float(self.run), float(self.recent)
        counts = (self.run_updates, self.recent_updates, self.recent_skipped)
        self.run_updates, self.recent_updates, self.recent_skipped = map(int, counts)

    def add(self, loss: float) -> None:
        """Count an update that was taken."""
        self.run, self.run_updates = self.run + loss, self.run_updates + 1
        self.recent, self.recent_updates = self.recent + loss, self.recent_updates + 1

    def row(self) -> dict[str, float]:
        """The numbers of a logged row; starts the next one. No `loss` if every update was skipped."""
        mean = {"loss": self.recent / self.recent_updates} if self.recent_updates else {}
        row = mean | {"skipped_updates": self.recent_skipped}
        self.recent, self.recent_updates, self.recent_skipped = 0.0, 0, 0
        return row


@dataclass
class MicroBatch:
    """One forward pass of an update. Rows: B chosen, then B rejected."""

    ids: Tensor  # int [2 B, T]
    mask: Tensor  # int [2 B, T]
    scores: Tensor  # float32 [2 B]
    loss: Tensor  # float []
    metrics: dict[str, float]  # over all ranks


class UpdateGuard(TrainerCallback):
    """Decides whether each optimizer step is taken, and delays checkpoints while steps are being skipped.

    rows: the token rows of the training set; pair_ids: their ids for skipped.jsonl, by default their positions.
    """

    def __init__(
        self, skips: Skips, rows: Iterable[dict[str, list[int]]], pair_ids: Sequence[str] | None = None
    ) -> None:
        self.skips, self.rows, self.pair_ids = skips, rows, pair_ids
        self.losses = Losses()
        self.micro_batches: list[MicroBatch] = []  # of this optimizer step
        self.taken = True
        self._delayed = (False, False)  # an evaluation, a checkpoint

    def should_step(self, accelerator: Accelerator, model: Any, step: int) -> bool:
        """Whether to take this step; call it after the last backward pass. model: as Accelerate has wrapped it."""
        loss = wide(torch.stack([batch.loss for batch in self.micro_batches])).mean()
        if is_deepspeed(accelerator):  # it has stepped in that pass, or has skipped the step
            norm, finite = step_taken(model, step)
        else:
            norm = gradient_norm(model)
            finite = bool(torch.tensor(norm).isfinite())
        lost = torch.tensor(float(not (finite and loss.isfinite())), device=loss.device)
        total, losers = all_sum(accelerator, torch.stack([loss, lost])).tolist()
        self.taken = not losers
        if self.taken:
            self.losses.add(total / accelerator.num_processes)
            self.skips.in_a_row = 0
            return True
        self.losses.recent_skipped += 1
        rows = all_rows(list(self._facts()))
        what = ["loss", "gradient"] if any(isinstance(row["loss"], str) for row in rows) else ["gradient"]
        self.skips.report(step, what, rows, grad_norm=json_number(norm))
        return False

    def _facts(self) -> Iterator[SkippedRow]:
        """This rank's pairs of the step, with their scores and the loss of their micro-batch; no texts."""
        known = {_key(row["chosen_ids"], row["rejected_ids"]): i for i, row in enumerate(self.rows)}
        for batch in self.micro_batches:
            sides = [ids[mask.bool()].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
            half = len(sides) // 2
            for chosen, rejected, *scores in zip(
                sides[:half], sides[half:], batch.scores[:half], batch.scores[half:], strict=True
            ):
                number = known[_key(chosen, rejected)]
                yield {
                    "pair_id": str(self.pair_ids[number] if self.pair_ids else number),
                    "chosen_tokens": len(chosen),
                    "rejected_tokens": len(rejected),
                    "scores": dict(zip(("chosen", "rejected"), map(json_number, scores), strict=True)),
                    "loss": json_number(batch.loss),
                }

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget micro-batches of a step that failed, for example one that ran out of memory."""
        self.micro_batches.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Skip the step: without gradients an optimizer leaves parameters and their moments unchanged."""
        if not self.taken:
            for parameter in model.parameters():
                parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """See `_delay`."""
        return self._delay(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """See `_delay`."""
        return self._delay(state, control)

    def _delay(self, state: TrainerState, control: TrainerControl) -> TrainerControl:
        """Delay the evaluation and checkpoint of a skipped step until a step is taken, or until the run ends.

        Otherwise save_total_limit would delete the checkpoints from before the trouble. Evaluation and checkpoint stay
        together, since the best validation loss needs its checkpoint.
        """
        evaluate, save = self._delayed
        evaluate, save = evaluate or control.should_evaluate, save or control.should_save
        if self.skips.in_a_row == 0 or state.global_step >= state.max_steps:
            self._delayed = (False, False)
            control.should_evaluate, control.should_save = evaluate, save
            return control
        self._delayed = (evaluate, save)
        control.should_evaluate = control.should_save = False
        if control.should_training_stop:
            screen.warn(
                f"step {state.global_step}: updates are being skipped; the checkpoint before them stays the newest"
            )
        return control


def _key(chosen: list[int], rejected: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(chosen), tuple(rejected)
