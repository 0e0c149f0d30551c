"""What surrounds the loop of `PPOTrainer`: reading rows, evaluating, saving the model, beginning."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from rlhf.data.chat import decode_response
from rlhf.errors import UserError
from rlhf.models.actor_critic import Model, base_of
from rlhf.ppo.actor import Actor, Experience
from rlhf.ppo.evaluation import completions, evaluate
from rlhf.ppo.export import push_policy, save_policy, with_weights
from rlhf.ppo.prompts import Prompt, as_row, batches, read_prompts
from rlhf.ppo.resume import Resumable
from rlhf.ppo.roles import Roles, parameter_lines
from rlhf.ppo.setup import prompts_that_fit
from rlhf.ppo.throughput import conditions, report
from rlhf.ppo.work import Meter, Work, total
from rlhf.runtime.checkpoint import PPO, set_later_aside
from rlhf.runtime.distributed import from_main, whole_weights
from rlhf.runtime.hardware import synchronise

Rows: TypeAlias = Dataset | list[dict[str, Any]]


class TrainerBase(Resumable):
    """Everything of `PPOTrainer` that is not the algorithm; the attributes are set by its constructor."""

    processing_class: PreTrainedTokenizerBase
    eval_prompts: dict[str, list[Prompt]]
    roles: Roles
    empty_policy: Model | None  # under FSDP2, the policy as it was before it was sharded, without weights
    models: list[dict[str, Any]]  # role, name, parameters, trainable
    actor: Actor
    timings: dict[str, float]  # seconds of each phase of the step
    meter: Meter
    work: list[dict[str, Work]]  # of each step so far, by phase, this rank's

    @property
    def state(self) -> TrainerState:
        """Steps and logs so far, as callbacks see them."""
        return self.flow.state

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """One more callback, after those that are there."""
        self.flow.callbacks.append(callback() if isinstance(callback, type) else callback)

    def generate(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Responses of the policy as token ids, for a loop of one's own: texts, messages or token ids in.

        Each rank passes prompts of its own, equally many on all ranks. `step` learns from what comes out.
        """
        rank = self.accelerator.process_index
        rows = [as_row(prompt, f"{rank}/{i}") for i, prompt in enumerate(prompts)]
        return self.actor.sample(read_prompts(rows, self.processing_class, name="prompts"), self.state.global_step + 1)

    def evaluate(self, eval_dataset: Rows | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Means over each evaluation set, whole, as eval/scores, eval/kl_per_token, ...; eval_NAME/... of several.

        They go to eval_metrics.jsonl, to the trackers, and to the callbacks' on_evaluate.
        """
        sets = self.eval_prompts if eval_dataset is None else {"": self._read(eval_dataset, "eval_dataset")}
        if not sets:
            raise UserError("eval_dataset: expected one for evaluation, found none")
        metrics: dict[str, float] = {}
        for name, prompts in sets.items():
            metrics |= evaluate(self.actor, prompts, f"{metric_key_prefix}_{name}" if name else metric_key_prefix)
        self.recorder.evaluation(self.state.global_step, metrics)
        self.state.log_history.append({"step": self.state.global_step, **metrics})
        self.flow.event("on_evaluate", metrics=metrics)
        return metrics

    def generate_completions(self, sampling: bool = False) -> list[dict[str, Any]]:
        """Prompt, response and score over the evaluation sets at a temperature near 0; with sampling, one batch.

        They are written to completions.jsonl in output_dir and returned.
        """
        rows = [row for prompts in self.eval_prompts.values() for row in completions(self.actor, prompts, sampling)]
        if not rows:
            raise UserError("eval_dataset: expected one for completions, found none")
        self.recorder.completions(rows)
        return rows

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Policy, tokenizer and model card. LoRA: the merged stock model, and the adapter in adapter/."""
        policy, folder = self.roles.trained.policy, Path(output_dir or self.folder)
        if self.empty_policy is not None:  # FSDP2's modules cannot be copied, so no adapter be merged into a copy
            main = self.accelerator.is_main_process
            weights = whole_weights(policy, keep=main)
            policy = with_weights(self.empty_policy, weights) if main else self.empty_policy
        with self.actor.whole() if self.empty_policy is None else nullcontext():
            save_policy(policy, self.processing_class, folder, self.accelerator, self._card_facts())

    def push_to_hub(
        self, commit_message: str = "End of training", dataset_name: str | None = None, tags: Sequence[str] = ()
    ) -> str | None:
        """Save the policy to output_dir and upload it with a model card; returns the commit's address on rank 0."""
        self.save_model()
        facts = self._card_facts()
        return push_policy(self.folder, self.args, self.accelerator, commit_message, facts, dataset_name, tags)

    def _card_facts(self) -> dict[str, Any]:
        """What a model card can say where no stage of a run has left a run.json."""
        name = base_of(self.roles.trained.policy).config.name_or_path or None
        counts = {"split_train": len(self.prompts)} if self.prompts else {}
        config = {"model_name_or_path": name, **self.args.to_dict()}
        return {"config": config, "data": {"prompts": counts}, "models": self.models}

    def _read_data(self, train_dataset: Rows | None, eval_dataset: Rows | dict[str, Rows] | None) -> None:
        self.prompts = [] if train_dataset is None else self._read(train_dataset, "train_dataset")
        sets = eval_dataset if isinstance(eval_dataset, dict) else {} if eval_dataset is None else {"": eval_dataset}
        self.eval_prompts = {name: self._read(rows, f"eval_dataset {name}".strip()) for name, rows in sets.items()}

    def _read(self, rows: Rows, name: str) -> list[Prompt]:
        return prompts_that_fit(self.args, rows, self.processing_class, self.roles.trained.policy, name)

    @property
    def steps_per_epoch(self) -> int:
        """PPO steps in which every prompt comes once."""
        return max(1, math.ceil(len(self.prompts) / self.batch_size))

    def throughput(self) -> list[str]:
        """Where the time of the steps so far went, how near to this machine's limits, and what would help.

        Of this rank's own share, without the first step, which warms up. `train` prints it at its end.
        """
        steps = self.work[1:] or self.work
        if not steps:
            return []
        return report(total(steps), conditions(self.args, self.meter))

    def _say(self, lines: list[str]) -> None:
        if lines and self.accelerator.is_main_process and not self.args.disable_tqdm:
            print("\n".join(lines))

    def _begin(self, first: int) -> None:
        """Before the first step: trackers, callbacks, what is trained, scores of the reference."""
        from_main(lambda: set_later_aside(self.folder / "checkpoints", PPO, first, self.args.save_total_limit))
        self.recorder.start(self.args, first)
        self._say(parameter_lines(self.models))
        self.flow.begin(first, self.num_total_batches, self.steps_per_epoch)
        if self.args.score_norm_samples and first == 0:
            self._fit_scores(self.args.score_norm_samples)
        if self.args.eval_on_start and first == 0:
            self.evaluate()

    def _fit_scores(self, n: int) -> None:
        if not self.prompts:
            raise UserError("score_norm_samples: expected a train_dataset to sample from, found none")
        order = next(batches(self.prompts, n, self.args.seed, 1))
        mean, std = self.actor.fit_scores(order)
        if self.accelerator.is_main_process:
            print(f"scores of the reference: mean {mean:.3f}, standard deviation {std:.3f}, {len(order)} responses")

    def _shows_samples(self, step: int) -> bool:
        wanted = min(self.args.num_sample_generations, self.num_total_batches)
        return wanted > 0 and (step == 1 or step % math.ceil(self.num_total_batches / wanted) == 0)

    def _samples(self, experience: Experience) -> list[dict[str, Any]]:
        """The first few prompts of this rank's share with what was answered."""
        scores = experience.rollout.raw_score[:4].tolist()
        return [
            {
                "prompt_id": prompt.prompt_id,
                "prompt": prompt.text,
                "response": decode_response(self.processing_class, response),
                "score": score,
            }
            for prompt, response, score in zip(experience.prompts, experience.responses, scores, strict=False)
        ]

    def _bar(self, first: int) -> Any:
        return tqdm(
            total=self.num_total_batches,
            initial=first,
            desc="PPO",
            unit="step",
            disable=self.args.disable_tqdm or not self.accelerator.is_main_process,
        )

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()  # nothing is left of the phase before: each ends with a wait
        yield
        if name != "generate":  # its responses are on the host already
            synchronise(self.accelerator.device)
        self.timings[name] = time.perf_counter() - start
