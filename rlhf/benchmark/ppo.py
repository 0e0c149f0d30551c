"""PPO steps by either side."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from rlhf.benchmark import work
from rlhf.benchmark.clock import Clock, most_memory


class Feed:
    """The rows in order, repeated `times` times, whatever index is asked for: each step of TRL's shuffling loader
    sees all rows.

    The last batch is never reached: at the end of a loader, TRL 1.12 takes one optimizer step per micro-batch.
    """

    def __init__(self, rows: list[list[int]], times: int) -> None:
        self.rows, self.times, self.given = rows, times, 0

    def __len__(self) -> int:
        return len(self.rows) * self.times

    def __getitem__(self, _: int) -> dict[str, list[int]]:
        row = self.rows[self.given % len(self.rows)]
        self.given += 1
        return {"input_ids": row}


class _Watched:
    """Wraps functions of TRL's module to read the clock; their results do not change."""

    def __init__(self, module: Any, eos: int) -> None:
        self.clock, self.tokens, self.eos = Clock("learn"), list[int](), eos
        self.generation, self.whiten = module.batch_generation, module.masked_whiten
        module.batch_generation, module.masked_whiten = self._generation, self._whiten
        self.updates = 0

    def _generation(self, model: Any, queries: Any, *args: Any, **kwargs: Any) -> Any:
        self.clock.mark("rest")
        sequences, logits = self.generation(model, queries, *args, **kwargs)
        self.clock.mark("generate")
        rows = sequences[:, queries.shape[1] :].tolist()
        self.tokens.append(sum(row.index(self.eos) + 1 if self.eos in row else len(row) for row in rows))
        return sequences, logits

    def _whiten(self, *args: Any, **kwargs: Any) -> Any:  # of the advantages; learning follows
        result = self.whiten(*args, **kwargs)
        self.clock.mark("score")
        return result

    def count_updates(self, optimizer: Any) -> None:
        step = optimizer.step

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.updates += 1
            return step(*args, **kwargs)

        optimizer.step = counted


def trl(run: work.Run, folder: str) -> dict[str, Any]:
    """TRL 1.12's PPOTrainer, unchanged."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = work.tokenizer_of(run.shape)
    policy, reward = work.models_of(run.shape, tokenizer, run.seed)
    value, lora = copy.deepcopy(reward), run.work == "ppo_lora"
    rows = work.prompts_of(run.shape, tokenizer, run.seed)
    before, watched = most_memory(), _Watched(ppo_trainer, tokenizer.eos_token_id)
    trainer = PPOTrainer(
        args=PPOConfig(**work.settings(run, folder)),
        processing_class=tokenizer,
        model=policy,
        ref_model=None if lora else copy.deepcopy(policy),
        reward_model=reward,
        value_model=value,
        train_dataset=Feed(rows, run.steps + 1),
        eval_dataset=Feed(rows[:1], 1),
        # There, GPT-2's query, key and value are one matrix.
        peft_config=work.lora_of(("q_proj", "v_proj") if run.shape.path else ("c_attn",), run.rank) if lora else None,
        callbacks=[watched.clock],
    )
    watched.count_updates(trainer.optimizer.optimizer)
    trainer.train()
    counts = {"response_tokens": watched.tokens, "updates": watched.updates}
    return _result(watched.clock, rows, counts, before)


def rlhf(run: work.Run, folder: str, kind: Any = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """This package's PPOTrainer. kind: a subclass of it."""
    from rlhf import PPOConfig, PPOTrainer

    tokenizer = work.tokenizer_of(run.shape)
    policy, reward = work.models_of(run.shape, tokenizer, run.seed)
    rows = work.prompts_of(run.shape, tokenizer, run.seed)
    before, clock = most_memory(), Clock("rest")
    trainer = (kind or PPOTrainer)(
        args=PPOConfig(**work.settings(run, folder)),
        processing_class=tokenizer,
        model=policy,
        reward_model=reward,
        train_dataset=[{"input_ids": row} for row in rows],
        peft_config=work.lora_of(("q_proj", "v_proj"), run.rank) if run.work == "ppo_lora" else None,
        callbacks=[clock, *callbacks],
    )
    trainer.train()
    log: Any = trainer.state.log_history
    for step, row in zip(clock.steps, log, strict=False):
        phases = {name.removeprefix("time/"): x for name, x in row.items() if name.startswith("time/")}
        step["rest"] -= sum(phases.values())
        step.update(phases)
    counts = {
        "response_tokens": [round(row["objective/response_length"] * run.shape.batch) for row in log],
        "updates": round(sum(row["val/updates"] for row in log)),
        # Of the last step; generation is bound by memory, too.
        "flops": {name: trainer.work[-1][name].ideal_seconds * trainer.meter.peak for name in ("score", "learn")},
        "floors": {name: one.ideal_seconds for name, one in trainer.work[-1].items()},  # seconds of the last step
        "computed": {name: one.computed for name, one in trainer.work[-1].items()},  # token positions, with padding
        "perf": {name: x for name, x in log[-1].items() if name.startswith("perf/")},
    }
    return _result(clock, rows, counts, before)


def _result(clock: Clock, rows: list[list[int]], counts: dict[str, Any], before: int) -> dict[str, Any]:
    return counts | {
        "steps": [step for step in clock.steps if step][1:],
        "prompt_tokens": sum(map(len, rows)),
        "longest_prompt": max(map(len, rows)),
        "memory_before": before,
        "memory_peak": most_memory(),
    }
