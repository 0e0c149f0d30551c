"""The reward model's training on preference pairs: tokenising, the trainer, resuming, and the evaluation on pairs."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from trl import RewardTrainer

from rlhf.config import RewardStageConfig
from rlhf.data.chat import Options, encode_prompt, encode_responses
from rlhf.data.hh_rlhf import Pair
from rlhf.distributed.collectives import from_main, gather_batch, on_all
from rlhf.distributed.deepspeed_config import configure_deepspeed
from rlhf.distributed.launch import check_engine, configure_fsdp
from rlhf.distributed.offload import prepare_offload
from rlhf.distributed.preemption import StopCallback, StopRequest
from rlhf.errors import UserError
from rlhf.file_types import SKIPPED, BestStep, ScoredPairs, SideScores, StepFile
from rlhf.functional.losses import pairwise_margin_ranking_loss
from rlhf.models.kernels.attention import use_cpu_attention
from rlhf.models.kernels.autocast_cache import frozen_cast
from rlhf.models.master_weights import keep_masters
from rlhf.models.unwrap import Model, max_positions, unwrap_peft
from rlhf.reward.manifest_callback import ManifestCallback, step_facts
from rlhf.reward.metrics import pair_metrics
from rlhf.reward.nonfinite import Losses, MicroBatch, UpdateGuard, pair_skips
from rlhf.reward.order import GlobalOrder
from rlhf.reward.packed import packed_passes
from rlhf.reward.scoring import score_pairs
from rlhf.storage.checkpoint import REWARD, checkpoint_step, newest_whole, problem_of, read_step, set_later_aside
from rlhf.storage.run_folder import append_row
from rlhf.storage.safe_load import check_pickles
from rlhf.tracking.board import BoardCallback
from rlhf.tracking.recorder import METRICS, keep_events, keep_rows, load_rows, one_tracker_run, write_event
from rlhf.tracking.skipped_updates import skip_line

TokenPair = dict[str, list[int]]  # `chosen_ids` and `rejected_ids`, as TRL's processed rows


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: Pair, options: Options | None = None) -> TokenPair:
    """The token ids of both sides: prompt, response and its end. options: of the chat template, for all pairs."""
    own = {**(options or {}), **pair.options}
    prompt = encode_prompt(tokenizer, pair.prompt, own)
    chosen, rejected = encode_responses(tokenizer, pair.prompt, [pair.chosen, pair.rejected], own)
    return {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    max_length: int | None,
    options: Options | None = None,
    counts: dict[str, int] | None = None,
) -> tuple[list[Pair], list[TokenPair]]:
    """The pairs of which both sides fit into max_length tokens and differ, and their token rows.

    counts: gets the others added, as `too_long` and `identical_tokens`.
    """
    dropped = {"too_long": 0, "identical_tokens": 0} if counts is None else counts
    kept: list[tuple[Pair, TokenPair]] = []
    for pair in pairs:
        row = encode_pair(tokenizer, pair, options)
        if max_length is not None and max(map(len, row.values())) > max_length:
            dropped["too_long"] += 1
        elif row["chosen_ids"] == row["rejected_ids"]:
            dropped["identical_tokens"] += 1
        else:
            kept.append((pair, row))
    return [pair for pair, _ in kept], [row for _, row in kept]


def check_positions(config: PretrainedConfig, splits: dict[str, list[TokenPair]]) -> None:
    """A UserError if a pair has more tokens than the model has positions. splits: token rows of the pairs, by split."""
    longest = max(len(side) for rows in splits.values() for row in rows for side in row.values())
    positions = max_positions(config)
    if positions is not None and longest > positions:
        raise UserError(
            f"max_length: set it to {positions} or less, the model's positions; the longest pair has {longest} tokens"
        )


def preference_loss(chosen: Tensor, rejected: Tensor, args: RewardStageConfig) -> Tensor:
    """The configured loss on scores, float [B] x2 -> scalar: margin ranking or Bradley-Terry, and what centres them."""
    if args.loss_type == "margin":
        loss = pairwise_margin_ranking_loss(chosen.float(), rejected.float(), args.margin)
    else:
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    centre = args.center_rewards_coefficient
    return loss if centre is None else loss + centre * ((chosen + rejected) ** 2).mean()


class PreferenceTrainer(RewardTrainer):
    """TRL's RewardTrainer with a choice of losses, which skips updates whose numbers are not finite.

    Logged losses and metrics are means over the updates taken. The metrics have TRL's names and definitions.
    """

    args: RewardStageConfig

    def __init__(self, *given: Any, guard: UpdateGuard | None = None, **options: Any) -> None:
        super().__init__(*given, **options)
        rows: Any = self.train_dataset
        self.guard = guard or UpdateGuard(pair_skips(self.args), rows)
        self.add_callback(self.guard)  # after all callbacks that ask for a checkpoint
        self.train_tokens = 0  # of the whole run, over all ranks
        # One value per micro-batch since the last logged row.
        self.train_metrics: dict[str, list[float]] = {}
        self.eval_metrics: dict[str, list[float]] = {}

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """transformers' hook: with global_batch_size, an order that is the same on any number of processes."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        order = GlobalOrder.of(self.args, list(zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)))
        return super()._get_train_sampler(train_dataset) if order is None else order

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro-batch of pairs, chosen rows before rejected; keeps its metrics for the next row."""
        outputs = model(**inputs, use_cache=False)
        scores = outputs.logits.squeeze(-1)
        chosen, rejected = scores.chunk(2)
        n = len(chosen) if model.training else self._n_valid(len(chosen))
        loss = preference_loss(chosen[:n], rejected[:n], self.args)
        metrics, tokens = self._metrics_of(outputs.logits.detach(), inputs["attention_mask"])
        if model.training:
            seen = loss.detach()
            self.train_tokens += tokens
            self.guard.micro_batches.append(
                MicroBatch(inputs["input_ids"], inputs["attention_mask"], scores.detach().float(), seen, metrics)
            )
            # The gradient of a loss that is not finite may be finite. NaN makes it not, which every engine checks.
            loss = loss * torch.where(seen.isfinite(), 1.0, math.nan)
        else:
            self._add(self.eval_metrics, metrics)
        return (loss, outputs) if return_outputs else loss

    def _n_valid(self, n_pairs: int) -> int:
        """How many pairs of this evaluation batch count; the others pad the last batch to its size.

        So the validation loss is the mean over the pairs, each once, on any number of processes. At least 1, since a
        mean needs one: Trainer drops the loss of a batch that is all padding.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return n_pairs
        return min(max(state.remainder - self.accelerator.process_index * n_pairs, 1), n_pairs)

    @torch.no_grad()
    def _metrics_of(self, logits: Tensor, mask: Tensor) -> tuple[dict[str, float], int]:
        """TRL's metrics of a micro-batch, and its tokens, over all ranks. logits [2 B, 1], mask [2 B, T]."""
        chosen, rejected = logits.squeeze(-1).chunk(2)
        own = torch.stack(
            [(chosen > rejected).float().mean(), (chosen - rejected).mean().float(), mask.sum().float()]
        )  # tokens of a micro-batch are far below 2^24, up to which float32 counts exactly
        rewards, rows = gather_batch(self.accelerator, logits, own)
        spread = torch.stack([rewards.min(), rewards.mean(), rewards.max()]).float()
        *values, tokens = torch.cat([spread, rows[:, :2].mean(0), rows[:, 2:].sum(0)]).tolist()
        names = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")
        return dict(zip(names, values, strict=True)), int(tokens)

    def _add(self, metrics: dict[str, list[float]], *micro_batches: dict[str, float]) -> None:
        metrics["num_tokens"] = [float(self.train_tokens)]
        for values in micro_batches:
            for name, value in values.items():
                metrics.setdefault(name, []).append(value)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward; after the last micro-batch of an update, decides whether to take it."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            taken = self.guard.should_step(self.accelerator, model, self.state.global_step + 1)
            self._add(self.train_metrics, *(part.metrics for part in self.guard.micro_batches if taken))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One row. Its losses replace transformers', which include skipped updates and restart when a run resumes."""
        losses = self.guard.losses
        if "loss" in logs:
            del logs["loss"]
            logs.update(losses.row())
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]  # skipped.jsonl has it
        if "train_loss" in logs:
            logs["train_loss"] = losses.run / max(losses.run_updates, 1)
        model: Any = self.model
        metrics, prefix = (self.train_metrics, "") if model.training else (self.eval_metrics, "eval_")
        logs.update({f"{prefix}{name}": sum(values) / len(values) for name, values in metrics.items()})
        super().log(logs, start_time)
        metrics.clear()

    def progress(self) -> dict[str, object]:
        """For step.json: what later rows depend on and transformers does not save."""
        return {"tokens": self.train_tokens, "losses": asdict(self.guard.losses), "metrics": self.train_metrics}

    def restore(self, facts: StepFile) -> None:
        """Resume from what `progress` returned."""
        self.train_tokens, self.guard.losses, self.train_metrics = read_progress(facts)


def read_progress(facts: StepFile) -> tuple[int, Losses, dict[str, list[float]]]:
    """Tokens, losses and metrics from a step.json; a KeyError, TypeError or ValueError if one is missing or broken."""
    metrics = {name: [float(value) for value in values] for name, values in dict(facts["metrics"]).items()}
    return int(facts["tokens"]), Losses(**facts["losses"]), metrics


class MetricsFile(TrainerCallback):
    """Appends each logged row to metrics.jsonl."""

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
        """Step, epoch and the logged numbers. A run that was stopped early has no summary row; its last part does."""
        stopped = "train_runtime" in (logs or {}) and state.global_step < state.max_steps
        if state.is_world_process_zero and logs and not stopped:
            numbers = {k: v for k, v in logs.items() if isinstance(v, int | float)}
            append_row(self.path, {"step": state.global_step, **numbers})


def train_reward_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: list[TokenPair],
    validation_rows: list[TokenPair],
    args: RewardStageConfig,
    pair_ids: Sequence[str] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[PreferenceTrainer, bool]:
    """Train, and load the checkpoint with the best validation loss into the model.

    Returns the trainer, and False if a signal stopped the run early: it has then saved a checkpoint to resume from.
    Resumes from the newest complete checkpoint in args.output_dir if there is one with its optimizer.
    An update whose loss or gradient is not finite is skipped and written to skipped.jsonl with the pair_ids of its
    pairs; max_skipped_updates of them in a row raise a UserError.
    """
    if args.deepspeed_plugin is not None:
        configure_deepspeed(args.deepspeed_plugin, args, counted=args.gradient_accumulation_steps)
    prepare_offload(args.deepspeed_plugin, args.optim)
    keep_masters(args, model)
    use_cpu_attention(unwrap_peft(model))
    folder = Path(args.output_dir or ".")
    checkpoint = newest_whole(folder, REWARD, _problem)
    if checkpoint and args.save_only_model and not _resumable(checkpoint):
        checkpoint = None
    from_main(lambda: _rewind(folder, checkpoint, args.save_total_limit))
    args.eval_on_start = not checkpoint  # the learning curve starts before the first step
    with ManifestCallback(args) as manifests, StopRequest() as request:
        stop = StopCallback(request)
        skips = pair_skips(args, lambda row: write_event(folder / SKIPPED, row, skip_line(row, "pair")))
        trainer = PreferenceTrainer(
            model=model,
            args=args,
            train_dataset=_dataset(train_rows),
            eval_dataset=_dataset(validation_rows),
            processing_class=tokenizer,
            callbacks=[*callbacks, MetricsFile(folder / METRICS), manifests, stop],
            guard=UpdateGuard(skips, train_rows, pair_ids),
        )
        if trainer.pop_callback(TensorBoardCallback) is not None:
            trainer.add_callback(BoardCallback(folder / "tensorboard"))
        keep_masters(args, model)  # TRL turns adapters on a quantised base into bfloat16
        check_engine(trainer.accelerator)
        configure_fsdp(trainer.accelerator)
        manifests.facts = lambda: step_facts(trainer.accelerator, args) | trainer.progress()
        if checkpoint:
            on_all(lambda: check_pickles(checkpoint))
            trainer.restore(from_main(lambda: read_step(checkpoint, manifests.facts())))
        first = checkpoint_step(checkpoint) if checkpoint else 0
        with one_tracker_run(args, folder, first), packed_passes(model):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer, not stop.stopped


def _dataset(rows: list[TokenPair]) -> Dataset:
    # group_by_length sorts by `length`; the collator drops it.
    return Dataset.from_list([row | {"length": max(map(len, row.values()))} for row in rows])


def _problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from: it, or the best one before it, is broken. None if neither is."""
    found = problem_of(checkpoint, read_progress)
    if found is None:
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            best = checkpoint.with_name(Path(state["best_model_checkpoint"] or checkpoint).name)
        except (OSError, ValueError, KeyError, TypeError):  # it matches its manifest, but anyone can write one
            return "a trainer_state.json that cannot be read"
        found = problem_of(best)
        found = found and f"the best before it, {best.name}, with {found}"
    return found


def _resumable(checkpoint: Path) -> bool:
    """Whether the states of an optimizer are in there: where only models are saved, that of a stop signal has them."""
    return any((checkpoint / name).exists() for name in ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest"))


def _rewind(folder: Path, checkpoint: Path | None, limit: int | None) -> None:
    """Set later checkpoints aside, truncate logs after the resume step, and restore the rows before it."""
    step = checkpoint_step(checkpoint) if checkpoint else 0
    last = step or -1  # a new run evaluates at step 0
    set_later_aside(folder, REWARD, step, limit)
    if checkpoint:
        load_rows(folder, checkpoint)
    for name in (METRICS, SKIPPED):
        keep_rows(folder / name, last)
    keep_events(folder / "tensorboard", last)


def best_step(trainer: PreferenceTrainer) -> BestStep:
    """Step and validation loss of the best checkpoint; call it on all ranks."""
    state = trainer.state
    history = [row for row in state.log_history if "eval_loss" in row]
    best = min(history, key=lambda row: row["eval_loss"]) if history else {}
    checkpoint = state.best_model_checkpoint
    if checkpoint:
        path = Path(checkpoint) / "trainer_state.json"  # other machines may see the file late
        saved = from_main(lambda: json.loads(path.read_text(encoding="utf-8")))
        return {"step": saved["global_step"], "eval_loss": state.best_metric}
    return {"step": int(best["step"]) if best else None, "eval_loss": best.get("eval_loss")}


def evaluate_pairs(model: Model, rows: list[TokenPair], args: RewardStageConfig) -> ScoredPairs:
    """Loss and `pair_metrics` on token rows, in the precision that args train in.

    `scores` are {"chosen": [N], "rejected": [N]}.
    """
    was_training = model.training
    model.eval()
    chosen, rejected = ([row[side] for row in rows] for side in ("chosen_ids", "rejected_ids"))
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    with torch.autocast(model.device.type, dtype, enabled=bool(args.fp16 or args.bf16)), frozen_cast(model):
        scores = score_pairs(model, chosen, rejected, args.per_device_eval_batch_size, show="score pairs").cpu()
    model.train(was_training)
    loss = preference_loss(scores[0], scores[1], args).item()
    sides: SideScores = {"chosen": scores[0].tolist(), "rejected": scores[1].tolist()}
    return {"loss": loss, "scores": sides, **pair_metrics(scores[0].numpy(), scores[1].numpy(), seed=args.seed)}
