"""The reward model: its training from start or checkpoint to the best weights, on rows tokenised by `data.chat`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlhf.config import RewardStageConfig
from rlhf.data.chat import encode_prompt, encode_response
from rlhf.data.hh_rlhf import Pair
from rlhf.functional.losses import pairwise_margin_ranking_loss
from rlhf.reward.metrics import pair_metrics
from rlhf.reward.preference import PreferenceTrainer, read_progress
from rlhf.reward.scoring import score_rows
from rlhf.reward.updates import UpdateGuard, pair_skips
from rlhf.runtime.checkpoint import REWARD, newest_whole, number, problem_of, read_step, set_later_aside
from rlhf.runtime.distributed import from_main, on_all
from rlhf.runtime.engine import check_engine, configure_fsdp
from rlhf.runtime.offload import prepare_offload
from rlhf.runtime.preemption import StopCallback, StopRequest
from rlhf.runtime.run_folder import append_row
from rlhf.runtime.safe_load import check_pickles
from rlhf.runtime.sealing import SealCheckpoint, step_facts
from rlhf.runtime.skips import line
from rlhf.runtime.tracking import METRICS, SKIPPED, keep_events, keep_rows, load_rows, write_event


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
    with SealCheckpoint(args) as seal, StopRequest() as request:
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
