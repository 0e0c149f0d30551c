"""Which optimizer steps of the reward model are taken: those whose loss and gradient are finite, on all ranks alike."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.config import RewardStageConfig
from rlhf.distributed.collectives import all_rows, all_sum, gradient_norm
from rlhf.distributed.launch import is_deepspeed
from rlhf.distributed.sharding import step_taken
from rlhf.functional.gae import wide
from rlhf.tracking.skipped_updates import Skips, number

_HINTS = {"gradient": "look at these pairs; a lower learning_rate may help"}


def pair_skips(args: RewardStageConfig, write: Callable[[dict[str, Any]], None] = lambda row: None) -> Skips:
    """Skips of updates on pairs."""
    return Skips(args.max_skipped_updates, write, "pair", _HINTS)


@dataclass
class Losses:
    """Sums over the updates taken, of the run and since the last row of metrics; alike on all ranks."""

    run: float = 0.0
    run_updates: int = 0
    recent: float = 0.0
    recent_updates: int = 0
    recent_skipped: int = 0

    def __post_init__(self) -> None:  # it may come out of a file
        self.run, self.recent = float(self.run), float(self.recent)
        counts = (self.run_updates, self.recent_updates, self.recent_skipped)
        self.run_updates, self.recent_updates, self.recent_skipped = map(int, counts)

    def add(self, loss: float) -> None:
        """An update that was taken."""
        self.run, self.run_updates = self.run + loss, self.run_updates + 1
        self.recent, self.recent_updates = self.recent + loss, self.recent_updates + 1

    def row(self) -> dict[str, float]:
        """What a row of metrics says; the next one begins. Without an update there is no mean."""
        mean = {"loss": self.recent / self.recent_updates} if self.recent_updates else {}
        row = mean | {"skipped_updates": self.recent_skipped}
        self.recent, self.recent_updates, self.recent_skipped = 0.0, 0, 0
        return row


@dataclass
class Part:
    """A micro-batch that was looked at: ids and mask [2 B, T], chosen before rejected, scores [2 B], its loss []."""

    ids: Tensor
    mask: Tensor
    scores: Tensor
    loss: Tensor


class UpdateGuard(TrainerCallback):
    """Judges each optimizer step before it is taken, and has no checkpoint written while steps are being left out.

    rows: the token rows that are trained on; pair_ids: what each is called in skipped.jsonl, otherwise by its place.
    """

    def __init__(
        self, skips: Skips, rows: Iterable[dict[str, list[int]]], pair_ids: Sequence[str] | None = None
    ) -> None:
        self.skips, self.rows, self.pair_ids = skips, rows, pair_ids
        self.losses = Losses()
        self.parts: list[Part] = []  # of this optimizer step
        self.taken = True
        self._owed = (False, False)  # evaluation and checkpoint that were put off

    def judge(self, accelerator: Accelerator, model: Any, step: int) -> bool:
        """Whether this step is to be taken, called after its last backward pass. model: as the engine wraps it."""
        loss = wide(torch.stack([part.loss for part in self.parts])).mean()
        if is_deepspeed(accelerator):  # which has stepped in that pass, or has left it out
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
        self.skips.left_out(step, what, rows, grad_norm=number(norm))
        return False

    def _facts(self) -> Iterator[dict[str, Any]]:
        """This rank's pairs of the step, with their scores and the loss of their micro-batch. No texts."""
        known = {_key(row["chosen_ids"], row["rejected_ids"]): i for i, row in enumerate(self.rows)}
        names = self.pair_ids or range(len(known))
        for part in self.parts:
            sides = [ids[mask.bool()].tolist() for ids, mask in zip(part.ids, part.mask, strict=True)]
            half = len(sides) // 2
            for chosen, rejected, *scores in zip(
                sides[:half], sides[half:], part.scores[:half], part.scores[half:], strict=True
            ):
                yield {
                    "pair_id": str(names[known[_key(chosen, rejected)]]),
                    "chosen_tokens": len(chosen),
                    "rejected_tokens": len(rejected),
                    "scores": dict(zip(("chosen", "rejected"), map(number, scores), strict=True)),
                    "loss": number(part.loss),
                }

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Nothing of a step that ran out of memory, say, is in the next one."""
        self.parts.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Without a gradient an optimizer leaves a parameter and its moments as they are."""
        if not self.taken:
            for parameter in model.parameters():
                parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """See `_put_off`."""
        return self._put_off(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """See `_put_off`."""
        return self._put_off(state, control)

    def _put_off(self, state: TrainerState, control: TrainerControl) -> TrainerControl:
        """Evaluation and checkpoint of a step that was left out come after the next one that is taken.

        Otherwise the limit would delete those from before the trouble. At the run's end, they come: its weights are
        those of the last step that was taken. The two stay together: the best validation loss needs its checkpoint.
        """
        evaluate, save = self._owed
        evaluate, save = evaluate or control.should_evaluate, save or control.should_save
        if self.skips.in_a_row == 0 or state.global_step >= state.max_steps:
            self._owed = (False, False)
            control.should_evaluate, control.should_save = evaluate, save
            return control
        self._owed = (evaluate, save)
        control.should_evaluate = control.should_save = False
        if control.should_training_stop and state.is_world_process_zero:
            print(f"step {state.global_step}: updates are being left out, so the checkpoint before them stays the last")
        return control


def _key(chosen: list[int], rejected: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(chosen), tuple(rejected)
