"""One run of one side, in a process of its own: python -m rlhf.benchmark.worker SIDE RUN.json; prints one JSON line."""

import json
import resource
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback


class Clock:
    """Seconds of each phase of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = [{}]
        self.last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """All the time since the last mark was this phase's."""
        now = time.perf_counter()
        self.steps[-1][phase] = self.steps[-1].get(phase, 0.0) + now - self.last
        self.last = now


class StepEnd(TrainerCallback):
    """Closes a step."""

    def __init__(self, clock: Clock, last: str) -> None:
        self.clock, self.last = clock, last

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.mark(self.last)
        self.clock.steps.append({})


class Feed:
    """The rows in their order, `times` over, whatever is asked for: each step of TRL's shuffling loader sees all.

    Its last batch is never reached: at a loader's end TRL 1.12 takes an optimizer step a micro-batch.
    """

    def __init__(self, rows: list[list[int]], times: int) -> None:
        self.rows, self.times, self.given = rows, times, 0

    def __len__(self) -> int:
        return len(self.rows) * self.times

    def __getitem__(self, _: int) -> dict[str, list[int]]:
        row = self.rows[self.given % len(self.rows)]
        self.given += 1
        return {"input_ids": row}


def resident() -> int:
    """The most bytes this process has held resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_trl(run: Any, folder: str) -> dict[str, Any]:
    """TRL 1.12's PPOTrainer as it is; its functions are wrapped to read the clock, and change nothing."""
    from datasets import Dataset
    from trl import __version__
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from rlhf.benchmark import work

    shape = run.shape
    tokenizer = work.tokenizer_of(shape)
    policy, reward = work.models_of(shape, tokenizer, run.seed)
    import copy

    value, reference = copy.deepcopy(reward), None if run.lora else copy.deepcopy(policy)
    rows = work.prompts_of(shape, tokenizer, run.seed)
    before = resident()
    clock, counts = Clock(), {"response_tokens": [], "optimizer_steps": 0}
    generation, whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

    def timed_generation(*args: Any, **kwargs: Any) -> Any:
        clock.mark("rest")
        sequences, logits = generation(*args, **kwargs)
        clock.mark("generate")
        width = args[1].shape[1]
        response = sequences[:, width:]
        ends = response == tokenizer.eos_token_id
        lengths = [row.index(True) + 1 if True in row else len(row) for row in ends.tolist()]
        counts["response_tokens"].append(sum(lengths))
        clock.last = time.perf_counter()
        return sequences, logits

    def timed_whiten(*args: Any, **kwargs: Any) -> Any:
        result = whiten(*args, **kwargs)
        clock.mark("score")
        return result

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = timed_generation, timed_whiten
    names = ("c_attn",) if not shape.path else ("q_proj", "v_proj")
    trainer = PPOTrainer(
        args=PPOConfig(**work.settings(run, folder)),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Feed(rows, run.steps + 1),
        eval_dataset=Dataset.from_dict({"input_ids": rows[:1]}),
        peft_config=work.lora_of(shape, names) if run.lora else None,
        callbacks=[StepEnd(clock, "learn")],
    )
    counted = trainer.optimizer.optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        counts["optimizer_steps"] += 1
        return counted(*args, **kwargs)

    trainer.optimizer.optimizer.step = step
    trainer.train()
    return _result(run, clock, counts, rows, before, f"trl {__version__}")


def run_rlhf(run: Any, folder: str) -> dict[str, Any]:
    """This package's PPOTrainer."""
    from rlhf import PPOConfig, PPOTrainer
    from rlhf.benchmark import work

    shape = run.shape
    tokenizer = work.tokenizer_of(shape)
    policy, reward = work.models_of(shape, tokenizer, run.seed)
    rows = work.prompts_of(shape, tokenizer, run.seed)
    before = resident()
    clock = Clock()
    trainer = PPOTrainer(
        args=PPOConfig(**work.settings(run, folder)),
        processing_class=tokenizer,
        model=policy,
        reward_model=reward,
        train_dataset=[{"input_ids": row} for row in rows],
        peft_config=work.lora_of(shape, ("q_proj", "v_proj")) if run.lora else None,
        callbacks=[StepEnd(clock, "rest")],
    )
    trainer.train()
    log = trainer.state.log_history
    for step, row in zip(clock.steps, log, strict=False):
        phases = {name.removeprefix("time/"): x for name, x in row.items() if name.startswith("time/")}
        step["rest"] -= sum(phases.values())
        step.update(phases)
    counts = {
        "response_tokens": [round(row["objective/response_length"] * shape.batch) for row in log],
        "optimizer_steps": int(sum(row["val/updates"] for row in log)),
    }
    return _result(run, clock, counts, rows, before, "rlhf")


def _result(
    run: Any, clock: Clock, counts: dict[str, Any], rows: list[list[int]], before: int, name: str
) -> dict[str, Any]:
    return {
        "side": name,
        "run": asdict(run),
        "steps": [step for step in clock.steps if step],
        "prompt_tokens": sum(map(len, rows)),
        "longest_prompt": max(map(len, rows)),
        **counts,
        "memory_before": before,
        "memory_peak": resident(),
    }


def main() -> None:
    side, given = sys.argv[1], json.loads(sys.argv[2])
    from rlhf.benchmark import work

    run = work.Run(**given | {"shape": work.SHAPES[given["shape"]]})
    with tempfile.TemporaryDirectory() as folder:
        result = {"trl": run_trl, "rlhf": run_rlhf}[side](run, folder)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
