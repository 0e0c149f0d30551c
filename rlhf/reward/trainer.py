"""The reward model: its training from start or checkpoint to the best weights, on rows tokenised by `data.chat`."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import RewardTrainer

from rlhf.config import RewardStageConfig
from rlhf.data.chat import encode_prompt, encode_response
from rlhf.data.hh_rlhf import Pair
from rlhf.distributed.collectives import from_main, on_all
from rlhf.distributed.launch import check_engine, configure_fsdp
from rlhf.distributed.offload import prepare_offload
from rlhf.distributed.preemption import StopCallback, StopRequest
from rlhf.errors import UserError
from rlhf.functional.losses import pairwise_margin_ranking_loss
from rlhf.reward.manifest_callback import ManifestCallback, step_facts
from rlhf.reward.metrics import pair_metrics
from rlhf.reward.nonfinite import Losses, Part, UpdateGuard, pair_skips
from rlhf.reward.order import GlobalOrder
from rlhf.reward.scoring import score_rows
from rlhf.storage.checkpoint import REWARD, newest_whole, number, problem_of, read_step, set_later_aside
from rlhf.storage.run_folder import append_row
from rlhf.storage.safe_load import check_pickles
from rlhf.tracking.recorder import METRICS, SKIPPED, keep_events, keep_rows, load_rows, write_event
from rlhf.tracking.skipped_updates import line


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


class MetricsFile(TrainerCallback):
    """Appends what the trainer logs to metrics.jsonl, one row a log."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        """One row: step, epoch and the logged numbers. The row that sums a run up comes once, at its true end."""
        stopped = "train_runtime" in (logs or {}) and state.global_step < state.max_steps
        if state.is_world_process_zero and logs and not stopped:
            numbers = {k: v for k, v in logs.items() if isinstance(v, int | float)}
            append_row(self.path, {"step": state.global_step, **numbers})


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> dict[str, list[int]]:
    """TRL's processed row: `chosen_ids` and `rejected_ids`, each the prompt, the response and EOS."""
    prompt = encode_prompt(tokenizer, pair.prompt)
    return {
        "chosen_ids": prompt + encode_response(tokenizer, pair.prompt, pair.chosen),
        "rejected_ids": prompt + encode_response(tokenizer, pair.prompt, pair.rejected),
    }


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], max_length: int | None
) -> tuple[list[Pair], list[dict[str, list[int]]]]:
    """The pairs whose two sides both fit into max_length tokens, and their token rows."""
    rows = [encode_pair(tokenizer, pair) for pair in pairs]
    fits = [max_length is None or max(map(len, row.values())) <= max_length for row in rows]
    return [p for p, ok in zip(pairs, fits, strict=True) if ok], [r for r, ok in zip(rows, fits, strict=True) if ok]


def evaluate_pairs(model: PreTrainedModel, rows: list[dict[str, list[int]]], args: RewardStageConfig) -> dict[str, Any]:
    """Loss, accuracy, mean margin, confusion matrix, classification report and calibration on token rows.

    `scores` are those behind them: {"chosen": [N], "rejected": [N]}.
    """
    was_training = model.training
    model.eval()
    sides = [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
    scores = score_rows(model, sides, args.per_device_eval_batch_size, show="score pairs").cpu()
    model.train(was_training)
    chosen, rejected = scores.chunk(2)
    loss = preference_loss(chosen, rejected, args).item()
    scores_of = {"chosen": chosen.tolist(), "rejected": rejected.tolist()}
    return {"loss": loss, "scores": scores_of, **pair_metrics(chosen.numpy(), rejected.numpy(), seed=args.seed)}


def preference_loss(chosen: Tensor, rejected: Tensor, args: RewardStageConfig) -> Tensor:
    """The configured loss on scores, float [B] x2 -> scalar."""
    if args.loss_type == "margin":
        return pairwise_margin_ranking_loss(chosen, rejected, args.margin)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def check_positions(config: PretrainedConfig, splits: dict[str, list[dict[str, list[int]]]]) -> None:
    """A UserError if a pair has more tokens than the model has positions. splits: token rows of the pairs, by split."""
    longest = max(len(side) for rows in splits.values() for row in rows for side in row.values())
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise UserError(
            f"max_length: set it to {positions} or less, the model's positions; the longest pair has {longest} tokens"
        )


def train_reward_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: list[dict[str, list[int]]],
    validation_rows: list[dict[str, list[int]]],
    args: RewardStageConfig,
    pair_ids: Sequence[str] | None = None,
) -> tuple[PreferenceTrainer, bool]:
    """Train, leave the checkpoint with the best validation loss in the model; returns the trainer, and whether it
    got to its end: told to stop by a signal, it saves a checkpoint and stops.

    An update whose loss or gradient is not finite is left out, and written to skipped.jsonl with its pairs by their
    pair_ids; max_skipped_updates of them in a row end the run by a UserError.
    Goes on from the newest whole checkpoint in args.output_dir if there is one with its optimizer.
    """
    prepare_offload(args.deepspeed_plugin, args.optim)
    folder = Path(args.output_dir or ".")
    checkpoint = None if args.save_only_model else newest_whole(folder, REWARD, _problem)
    # Where transformers' TensorBoard callback writes, which otherwise is the working folder.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    from_main(lambda: _take_out_later(folder, checkpoint, args.save_total_limit))
    args.eval_on_start = not checkpoint  # the learning curve starts before the first step
    with ManifestCallback(args) as seal, StopRequest() as request:
        stop = StopCallback(request)
        skips = pair_skips(args, lambda row: write_event(folder / SKIPPED, row, line(row, "pair")))
        trainer = PreferenceTrainer(
            model=model,
            args=args,
            train_dataset=_dataset(train_rows),
            eval_dataset=_dataset(validation_rows),
            processing_class=tokenizer,
            callbacks=[MetricsFile(folder / METRICS), seal, stop],
            guard=UpdateGuard(skips, train_rows, pair_ids),
        )
        check_engine(trainer.accelerator)
        configure_fsdp(trainer.accelerator)
        seal.facts = lambda: step_facts(trainer.accelerator, args) | trainer.progress()
        if checkpoint:
            on_all(lambda: check_pickles(checkpoint))
            trainer.restore(from_main(lambda: read_step(checkpoint, seal.facts())))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer, not stop.stopped


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or with the best one so far, which the run is to end with."""
    found = problem_of(checkpoint, read_progress)
    if found is None:
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            best = checkpoint.with_name(Path(state["best_model_checkpoint"] or checkpoint).name)
        except (OSError, ValueError, KeyError, TypeError):  # whole by its manifest, which anybody can write
            return "a trainer_state.json that cannot be read"
        found = problem_of(best)
        found = found and f"the best before it, {best.name}, with {found}"
    return found


def _take_out_later(folder: Path, checkpoint: Path | None, limit: int | None) -> None:
    """Nothing of later steps stays than the one that the run goes on from, and nothing of that or before is missing."""
    step = number(checkpoint) if checkpoint else 0
    last = step or -1  # a run that begins evaluates at step 0
    set_later_aside(folder, REWARD, step, limit)
    if checkpoint:
        load_rows(folder, checkpoint)
    for name in (METRICS, SKIPPED):
        keep_rows(folder / name, last)
    keep_events(folder / "tensorboard", last)


def _dataset(rows: list[dict[str, list[int]]]) -> Dataset:
    # `length` is what group_by_length sorts by; the collator leaves it out.
    return Dataset.from_list([row | {"length": max(map(len, row.values()))} for row in rows])


def best_step(trainer: PreferenceTrainer) -> dict[str, Any]:
    """Step and validation loss of the checkpoint that was kept; asked on all ranks."""
    state = trainer.state
    history = [row for row in state.log_history if "eval_loss" in row]
    best = min(history, key=lambda row: row["eval_loss"]) if history else {}
    checkpoint = state.best_model_checkpoint
    if checkpoint:
        path = Path(checkpoint) / "trainer_state.json"  # which may be seen late by other machines
        saved = from_main(lambda: json.loads(path.read_text(encoding="utf-8")))
        return {"step": saved["global_step"], "eval_loss": state.best_metric}
    return {"step": best.get("step"), "eval_loss": best.get("eval_loss")}
