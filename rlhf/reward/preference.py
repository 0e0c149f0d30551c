"""TRL's RewardTrainer under the margin ranking loss, whose updates are taken only where they are finite."""

import math
from collections import defaultdict
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from trl import RewardTrainer

from rlhf.config import RewardStageConfig
from rlhf.functional.losses import pairwise_margin_ranking_loss
from rlhf.reward.order import GlobalOrder
from rlhf.reward.updates import Losses, Part, UpdateGuard, pair_skips


class PreferenceTrainer(RewardTrainer):
    """TRL's RewardTrainer with the pairwise margin ranking loss beside its Bradley-Terry loss.

    The losses and metrics that it logs are means over the updates that were taken.
    """

    args: RewardStageConfig

    def __init__(self, *given: Any, guard: UpdateGuard | None = None, **options: Any) -> None:
        super().__init__(*given, **options)
        rows: Any = self.train_dataset
        self.guard = guard or UpdateGuard(pair_skips(self.args), rows)
        self.add_callback(self.guard)  # after all that ask for a checkpoint

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """With global_batch_size, an order that is the same on any number of processes; transformers' hook for one."""
        args = self.args
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = str(args.train_sampling_strategy)
        if args.global_batch_size is None or strategy == "batch_rebalance":  # that one goes by global batches itself
            return super()._get_train_sampler(train_dataset)
        lengths = [max(map(len, sides)) for sides in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
        seed = args.seed if args.data_seed is None else args.data_seed
        return GlobalOrder(lengths, args.global_batch_size, seed, strategy)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch of pairs; TRL's own computation logs accuracy and margin."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        scores = outputs.logits.squeeze(-1).float()
        chosen, rejected = scores.chunk(2)
        real = len(chosen) if model.training else self._real_pairs(len(chosen))
        if self.args.loss_type == "margin":
            loss = pairwise_margin_ranking_loss(chosen[:real], rejected[:real], self.args.margin)
        elif real < len(chosen):
            loss = -torch.nn.functional.logsigmoid(chosen[:real] - rejected[:real]).mean()
            loss += (self.args.center_rewards_coefficient or 0.0) * ((chosen[:real] + rejected[:real]) ** 2).mean()
        if model.training:
            seen = loss.detach()
            self.guard.parts.append(Part(inputs["input_ids"], inputs["attention_mask"], scores.detach(), seen))
            # The gradient of a loss that is not finite may be: NaN times it is not, which every engine looks at.
            loss = loss * torch.where(seen.isfinite(), 1.0, math.nan)
        return (loss, outputs) if return_outputs else loss

    def _real_pairs(self, rows: int) -> int:
        """How many of this batch of an evaluation are its own; those after them only fill it up, in its last one.

        The validation loss is then the mean over the pairs, each once, on any number of processes. At least 1, since
        there is no mean of none: such a batch counts for nothing.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - self.accelerator.process_index * rows, 1), rows)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward; after the last of an optimizer step, whether that is to be taken."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and not self.guard.judge(
            self.accelerator, model, self.state.global_step + 1
        ):
            self._forget_metrics(len(self.guard.parts))
        return loss

    def _forget_metrics(self, parts: int) -> None:
        """What was left out is in no mean. TRL keeps a number a micro-batch, but its count of tokens, which is one."""
        kept = {name: values if name == "num_tokens" else values[:-parts] for name, values in self._train().items()}
        self._metrics["train"] = defaultdict(list, {name: values for name, values in kept.items() if values})

    def _train(self) -> dict[str, list[float]]:
        """TRL's metrics since the last row, in an attribute of its own that no checkpoint of transformers' holds."""
        return self._metrics["train"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Means over the updates taken, in the place of transformers', which know of none that was left out.

        Those also begin anew when a run goes on.
        """
        losses = self.guard.losses
        if "loss" in logs:
            del logs["loss"]
            logs.update(losses.row())
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]  # skipped.jsonl has it
        if "train_loss" in logs:
            logs["train_loss"] = losses.run / max(losses.run_updates, 1)
        super().log(logs, start_time)

    def progress(self) -> dict[str, Any]:
        """What later rows depend on besides what transformers saves, for step.json."""
        return {"tokens": self._total_train_tokens, "losses": asdict(self.guard.losses), "metrics": self._train()}

    def restore(self, facts: dict[str, Any]) -> None:
        """Go on from what `progress` said."""
        self._total_train_tokens, self.guard.losses, metrics = read_progress(facts)
        self._metrics["train"] = defaultdict(list, metrics)


def read_progress(facts: dict[str, Any]) -> tuple[int, Losses, dict[str, list[float]]]:
    """Tokens, losses and metrics out of a step.json; a KeyError, TypeError, ... where they are not in it."""
    metrics = {name: [float(value) for value in values] for name, values in dict(facts["metrics"]).items()}
    return int(facts["tokens"]), Losses(**facts["losses"]), metrics
