"""PPO (Ziegler et al. 2019, Stiennon et al. 2020): collect a rollout, compute advantages, learn, record.

Read `PPOTrainer.train` first, then `_loop` and `_finish_step`.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tqdm.auto import tqdm
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
)

from rlhf.config import PPOConfig
from rlhf.config.trl_names import answers_old_names
from rlhf.console import screen
from rlhf.data.chat import prepare_tokenizer
from rlhf.distributed.accelerator import clear_cache, make_accelerator
from rlhf.distributed.collectives import Shard, all_sum, from_main, full_state_dict
from rlhf.distributed.deepspeed_config import fill_sizes
from rlhf.distributed.launch import autocast_dtype, check_wrapped, is_deepspeed, is_fsdp
from rlhf.distributed.offload import check_given_optimizer
from rlhf.distributed.preemption import StopRequest
from rlhf.distributed.sharding import cast_weights
from rlhf.distributed.unwrapped_weights import register_unwrapped_weights
from rlhf.errors import UserError
from rlhf.file_types import SKIPPED, WARNINGS, Completion, ModelSize, RunFile
from rlhf.generation.decode import Samples
from rlhf.models.actor_critic import ValueHead, ids_without_token
from rlhf.models.unwrap import is_quantised, max_positions, unwrap_peft
from rlhf.perf.throughput import conditions, report
from rlhf.perf.work import Meter, StepPasses, Work, total
from rlhf.ppo.advantages import AdaptiveKLController, Advantages, ScoreScaler, compute_advantages
from rlhf.ppo.callbacks import Callbacks
from rlhf.ppo.checkpointing import Checkpoints
from rlhf.ppo.evaluation import check_metric, completions, evaluate, sample_rows
from rlhf.ppo.export import push_policy, save_policy, with_weights, without_weights
from rlhf.ppo.health import HealthMonitor, warning_line
from rlhf.ppo.learner import Learner, Update
from rlhf.ppo.metrics import metrics_row
from rlhf.ppo.optim import count_steps, make_optimizer
from rlhf.ppo.prompts import (
    Prompt,
    as_row,
    batches,
    check_evaluation,
    check_ids,
    check_positions,
    eos_ids,
    read_prompts,
    response_ids,
)
from rlhf.ppo.roles import (
    build_roles,
    check_apart,
    check_language_model,
    check_shardable,
    describe_roles,
    parameter_lines,
)
from rlhf.ppo.rollout import Rollout, RolloutCollector, nonfinite_rows
from rlhf.reward.reward_functions import (
    FunctionReward,
    ModelReward,
    RewardModelOrFunction,
    build_reward_functions,
    first_token_model,
    resolve_rewards,
)
from rlhf.reward.tokenizers import check_value_model
from rlhf.storage.checkpoint import PPO, set_later_aside
from rlhf.storage.lock import one_writer
from rlhf.tracking.recorder import Recorder
from rlhf.tracking.skipped_updates import Skips, skip_line

Rows: TypeAlias = Dataset | list[dict[str, Any]]


class PhaseTimer:
    """Seconds of each phase of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block as a phase. Each but "generate", whose responses are on the host, ends with a wait."""
        start = time.perf_counter()
        yield
        if phase != "generate" and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.seconds[phase] = time.perf_counter() - start


@answers_old_names
class PPOTrainer:
    """Proximal policy optimisation of a causal language model against a reward.

    Arguments are TRL 1.12's. The policy `model` is trained in place. Rows of train_dataset have `prompt` (text
    or messages), `messages` or `input_ids`; their other columns go to reward functions. reward_model: a
    sequence-classification model, a function as TRL's reward_funcs, or a list of these (reward_weights weighs
    them); reward_processing_classes gives the tokenizers of models that have another one than the policy.
    Without ref_model the reference is the policy as it is now; without value_model the critic starts as the
    reward model, or as the policy under a new head where rewards are functions. With a peft_config, or a policy
    that has an adapter already, only adapters (and the critic's head) are trained. data_collator: None or
    DataCollatorWithPadding; batches are built here.
    """

    state: TrainerState  # steps and logs so far, as callbacks see them
    models: list[ModelSize]
    work: list[dict[str, Work]]  # of each step so far, by phase, this rank's
    episode: int  # responses so far, over all ranks
    stopped: bool  # told to stop by a signal, before the last step

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | PeftModel | None = None,
        reward_model: RewardModelOrFunction | list[RewardModelOrFunction] | None = None,
        train_dataset: Rows | None = None,
        value_model: PreTrainedModel | PeftModel | None = None,
        data_collator: Any = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: Sequence[type[TrainerCallback] | TrainerCallback] | None = None,
        peft_config: LoraConfig | None = None,
        reward_processing_classes: Any = None,
    ) -> None:
        if data_collator is not None and not isinstance(data_collator, DataCollatorWithPadding):
            raise UserError(
                f"data_collator: leave it out: {type(data_collator).__name__} is not used, batches are built here"
            )
        check_evaluation(args, eval_dataset)
        check_language_model("model", model)
        if ref_model is not None:
            check_language_model("ref_model", ref_model)
        self.args = args
        self.accelerator = make_accelerator(args)
        self.processing_class = prepare_tokenizer(processing_class)
        device, main = self.accelerator.device, self.accelerator.is_main_process
        # The roles, and what they are scored by.
        specs = resolve_rewards(
            reward_model, reward_processing_classes, args.reward_weights, self.processing_class, model
        )
        check_value_model(value_model, self.processing_class, model)
        judges = [("reward_model", spec.reward) for spec in specs if spec.is_model]
        check_apart({"model": model, "value_model": value_model}, [("ref_model", ref_model), *judges])
        stop = eos_ids(args, model, processing_class)
        self.roles = build_roles(args, model, ref_model, first_token_model(specs), value_model, peft_config)
        trained, policy = self.roles.trained, self.roles.trained.policy
        check_shardable(self.accelerator, trained)
        trained.suppress_tokens = ids_without_token(policy, self.processing_class, stop, device)
        self.roles.reference.to(device)
        self.models = describe_roles(self.roles)
        self.rewards = rewards = build_reward_functions(specs, self.roles.reward, self.processing_class, args, device)
        reward_roles = {reward.name: reward.role for reward in rewards if isinstance(reward, ModelReward)}
        # The data, and how many steps that makes.
        self._read_data(train_dataset, eval_dataset)
        functions = [reward for reward in rewards if isinstance(reward, FunctionReward)]
        if not functions:  # those may log metrics of their own
            check_metric(args.metric_for_best_model, [reward.name for reward in rewards], self.eval_prompts)
        for prompts in filter(None, (self.prompts, *self.eval_prompts.values())):
            for function in functions:
                function.check(sorted(set().union(*(prompt.columns for prompt in prompts))))
        self.batch_size = args.local_batch_size * self.accelerator.num_processes
        self.num_total_batches = count_steps(args, len(self.prompts), self.batch_size)
        # What is trained, prepared.
        optimizer, self.scheduler = make_optimizer(args, trained, optimizers, self.num_total_batches)
        if is_deepspeed(self.accelerator):
            check_given_optimizer(self.accelerator.state.deepspeed_plugin, optimizer)
            fill_sizes(self.accelerator, trained.policy_base.config)
        frozen = [role for role in (self.roles.reference, *reward_roles.values()) if not role.shared]
        cast_weights(self.accelerator, [trained, *(r.model for r in frozen if not is_quantised(r.model))])
        # Under FSDP2, the policy as it was before it was sharded, without weights.
        self.empty_policy = without_weights(policy) if is_fsdp(self.accelerator) else None
        self.model, self.optimizer = self.accelerator.prepare(trained, optimizer)
        check_wrapped(self.accelerator, self.model)
        # The parts of a step.
        self.collector = RolloutCollector(
            args, self.roles, rewards, self.processing_class, stop, self.accelerator, self.model
        )
        self.scaler = ScoreScaler(args)
        self.kl_control = AdaptiveKLController(args.kl_coef, args.kl_target or math.inf, args.kl_horizon)
        self.recorder = Recorder(self.accelerator, self.folder)
        shown = {"processing_class": processing_class, "optimizer": self.optimizer, "lr_scheduler": self.scheduler}
        self.callbacks = Callbacks(args, callbacks or [], main, model=policy, **shown)
        self.state = self.callbacks.state
        for function in functions:
            function.state = self.state
        skips = Skips(args.max_skipped_updates, lambda row: self.recorder.event(SKIPPED, row, skip_line(row)))
        self.learner = Learner(self.model, self.optimizer, self.accelerator, args, self.callbacks.event, skips)
        dtype = autocast_dtype(self.accelerator) or policy.dtype
        self.timer = PhaseTimer(device)
        self.meter = Meter(trained, self.roles.reference, reward_roles, device, dtype)
        self.health = HealthMonitor(args, lambda row: self.recorder.event(WARNINGS, row, warning_line(row)))
        # The scheduler counts PPO steps, so it is not prepared: Accelerate would step it once per process.
        register_unwrapped_weights(self.accelerator)
        self.accelerator.register_for_checkpointing(self.scheduler, self.kl_control, self.scaler)
        self.checkpoints = Checkpoints(
            args,
            self.accelerator,
            self.folder,
            trained,
            self.prompts,
            self.batch_size,
            self.callbacks,
            self.recorder,
            skips,
            self.health,
            self.optimizer,
            self.scheduler,
            self.kl_control,
            type(optimizer),
        )
        self.work, self.episode, self.stopped = [], 0, False
        self._asked: Counter[str] = Counter()  # ids that `generate` was given since the last step
        self.callbacks.event("on_init_end")

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> None:
        """Run all PPO steps; from a checkpoint folder, or with True from the run's newest, the steps after it.

        On SIGUSR1, SIGTERM, SIGHUP or a first Ctrl-C it finishes the current step, saves a checkpoint and sets
        `stopped`. At its end it prints `throughput`. Only one process at a time may write to output_dir; a second one
        is a UserError.
        """
        for name, found in (("train_dataset", self.prompts), ("reward_model", self.collector.rewards)):
            if not found:
                raise UserError(f"{name}: pass one to train on")
        with StopRequest() as request, one_writer(self.folder):
            first, self.episode = self.checkpoints.load(resume_from_checkpoint or self.args.resume_from_checkpoint)
            self._begin(first)
            with self.checkpoints.saver:
                self._loop(first, request)
            if self.args.load_best_model_at_end and not self.stopped:
                screen.say(self.checkpoints.load_best())
            self.callbacks.event("on_train_end")
            self.recorder.end()
            self._say(self.throughput())
            if self.args.push_to_hub and not self.stopped:
                self.push_to_hub()

    def _loop(self, first: int, request: StopRequest) -> None:
        """All steps after the first ones, which a run before this one has done."""
        per_epoch = self.steps_per_epoch
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        with self._bar(first) as bar:
            for step, batch in enumerate(batches(self.prompts, self.batch_size, seed, self.num_total_batches), start=1):
                if step <= first:
                    continue
                if step % per_epoch == 1 % per_epoch:
                    self.callbacks.event("on_epoch_begin")
                row = self._finish_step(step, self.collect(step, batch))
                bar.set_postfix_str(f"reward {row['objective/scores']:.3f} kl {row['objective/kl_per_token']:.4f}")
                bar.update()
                if step % per_epoch == 0:
                    self.callbacks.event("on_epoch_end")
                    self._log_eval_save(step, row)
                if self.callbacks.control.should_training_stop:
                    break
                if request.asked():
                    self._stop(step)
                    break

    def collect(self, step: int, batch: list[Prompt]) -> Rollout:
        """Sample this rank's share of the responses; then every role and every reward reads them once."""
        self.callbacks.event("on_step_begin")
        self.timer.seconds = {}
        shard = Shard.of_rank(len(batch), self.accelerator)
        prompts = shard.of(batch)
        # vLLM is sent one weight after another, as they are sharded.
        with nullcontext() if self.args.use_vllm else self.collector.gathered_params():
            with self.timer("generate"):
                samples = self.collector.sample(prompts, step)
            with self.timer("score"):
                return self.collector.complete(prompts, samples, shard)

    def _finish_step(self, step: int, rollout: Rollout) -> dict[str, float]:
        """From a rollout to the row of metrics."""
        nonfinite = nonfinite_rows(rollout, self.accelerator)
        advantages = self.compute_advantages(rollout, None if nonfinite else self.scaler)
        with self.timer("learn"), self.collector.cast_frozen_layers():
            update = self.learner.skip(step, nonfinite) if nonfinite else self.learn(step, rollout, advantages)
        row = self.record(step, rollout, advantages, update)
        if self.args.kl_target is not None and not nonfinite:
            self.kl_control.update(row["objective/kl_per_token"], rollout.shard.n_items)
        if self.args.torch_empty_cache_steps and step % self.args.torch_empty_cache_steps == 0:
            clear_cache(self.accelerator.device)
        self.callbacks.event("on_step_end")
        self.health.check(step, row, rollout.shard.n_items)
        if self._shows_samples(step):
            self.recorder.samples(step, sample_rows(rollout, self.collector.text, 4))
        self._log_eval_save(step, row)
        return row

    def compute_advantages(self, rollout: Rollout, scaler: ScoreScaler | None) -> Advantages:
        """Advantages and returns; means and deviations are over all ranks."""
        kl_coef = self.kl_control.kl_coef
        return compute_advantages(rollout, kl_coef, self.args, lambda x: all_sum(self.accelerator, x), scaler)

    def learn(self, step: int, rollout: Rollout, advantages: Advantages) -> Update:
        """A few clipped optimizer steps."""
        return self.learner.learn(rollout, advantages, step)

    def record(self, step: int, rollout: Rollout, advantages: Advantages, update: Update) -> dict[str, float]:
        """The step's row of metrics, by one collective; then the learning rate moves."""
        n, seconds = rollout.shard.n_items, self.timer.seconds
        work = self.meter.step(
            StepPasses(
                prompts=[prompt.input_ids for prompt in rollout.prompts],
                responses=rollout.responses,
                n_valid=rollout.shard.n_valid,
                calls=rollout.calls,
                scored=rollout.passes,
                rewards=rollout.reward_passes,
                learned=update.passes,
            ),
            seconds,
        )
        self.work.append(work)
        kl_coef = self.kl_control.kl_coef
        row = metrics_row(rollout, advantages, update, kl_coef, self.args, self.accelerator, work)
        self.episode += n
        epoch = self.episode / max(len(self.prompts), 1)
        row |= {"lr": self.scheduler.get_last_lr()[0], "episode": self.episode, "epoch": epoch}
        row |= {f"time/{phase}": time for phase, time in seconds.items()}
        row |= {"eps": n / max(sum(seconds.values()), 1e-9)}
        self.scheduler.step()
        self.state.global_step, self.state.epoch = step, epoch
        return row

    def _log_eval_save(self, step: int, row: dict[str, float]) -> None:
        """Log, evaluate and save if the callbacks decided so."""
        metrics = None
        if self.callbacks.pop("log"):
            self.recorder.row(step, row)
            self.state.log_history.append({"step": step, **row})
            self.callbacks.event("on_log", logs=row)
        if self.callbacks.pop("evaluate"):
            metrics = self.evaluate()
        saved = self.checkpoints.save_if_due(step, self.episode, metrics)
        if saved and self.args.push_to_hub and self.args.hub_strategy == "every_save":
            self.push_to_hub(f"Step {step}")

    def _stop(self, step: int) -> None:
        """Leave a checkpoint of this step, unless there is one or the run is over."""
        self.stopped = step < self.num_total_batches
        # Not decided by the folder: a network file system shows it to each rank in its own time.
        if self.stopped and self.checkpoints.saver.step != step:
            self.checkpoints.save(step, self.episode)

    def step(self, prompts: Sequence[Any], responses: Sequence[Any], scores: Sequence[Any]) -> dict[str, float]:
        """One PPO step on responses (token ids or texts) that the caller sampled and scored; returns its metrics.

        Each rank passes its own rows, equally many on all ranks. The learning rate's schedule counts these calls:
        max_steps or total_episodes says for how many.
        """
        n = len(prompts)
        if not n or not n == len(responses) == len(scores):
            raise UserError(
                f"step: expected {n or 'some'} responses and scores, found {len(responses)} and {len(scores)}"
            )
        rows = [as_row(prompt, str(i)) for i, prompt in enumerate(prompts)]
        read = read_prompts(rows, self.processing_class, name="prompts", options=self.args.chat_template_kwargs)
        tokens = [response_ids(self.processing_class, p, responses[i], i) for i, p in enumerate(read)]
        self._check_fit(read, [len(response) for response in tokens])
        check_ids(self.roles.trained.policy, tokens, "responses")
        self._asked.clear()
        column = torch.tensor([[float(score)] for score in scores], device=self.accelerator.device)
        if not self.recorder.is_open:
            self._begin(self.state.global_step)
        self.callbacks.event("on_step_begin")
        self.timer.seconds = {}
        shard = Shard.of_rank(n * self.accelerator.num_processes, self.accelerator)
        with self.timer("score"):
            rollout = self.collector.complete(read, Samples(tokens, []), shard, scores=column)
        return self._finish_step(self.state.global_step + 1, rollout)

    def resume(self, checkpoint: str | Path | bool = True) -> int:
        """For your own loop, before its first step: load a checkpoint folder, or with True the run's newest one.

        Returns the number of its step. `train` does this itself, see its resume_from_checkpoint.
        """
        self.state.global_step, self.episode = self.checkpoints.load(checkpoint)
        return self.state.global_step

    @property
    def folder(self) -> Path:
        """Where the run writes: output_dir, or the current folder."""
        return Path(self.args.output_dir or ".")

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """One more callback, after those that are there."""
        self.callbacks.callbacks.append(callback() if isinstance(callback, type) else callback)

    def generate(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Responses of the policy as token ids, for your own loop: texts, messages or token ids in.

        Each rank passes its own prompts, equally many on all ranks. `step` learns from what comes out. A prompt that is
        asked again before the step gets another response.
        """
        rank = self.accelerator.process_index
        rows = [as_row(prompt, f"{rank}/{i}") for i, prompt in enumerate(prompts)]
        read = read_prompts(rows, self.processing_class, name="prompts", options=self.args.chat_template_kwargs)
        self._check_fit(read, [self.args.response_length] * len(read))
        return self.collector.sample(list(map(self._asked_again, read)), self.state.global_step + 1).responses

    def _asked_again(self, prompt: Prompt) -> Prompt:
        """The prompt, with random numbers of its own if `generate` has had one of its id since the last step."""
        before = self._asked[prompt.prompt_id]
        self._asked[prompt.prompt_id] += 1
        return replace(prompt, stream=f"{prompt.stream}#{before}") if before else prompt

    def _check_fit(self, prompts: Sequence[Prompt], more: Sequence[int]) -> None:
        """A UserError if a prompt and its response, of so many tokens, have more than the model has positions."""
        check_ids(self.roles.trained.policy, [prompt.input_ids for prompt in prompts], "prompts")
        role, positions = min(self._positions().items(), key=lambda one: one[1], default=("model", math.inf))
        for i, (prompt, length) in enumerate(zip(prompts, more, strict=True)):
            if len(prompt.input_ids) + length > positions:
                raise UserError(
                    f"prompts row {i}: expected prompt and response of at most {positions} tokens, the {role}'s "
                    f"positions, found {len(prompt.input_ids)} and {length}"
                )

    def evaluate(self, eval_dataset: Rows | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Means over each evaluation set, whole, as eval/scores, eval/kl_per_token, ...; eval_NAME/... of several.

        They go to eval_metrics.jsonl, to the trackers, and to the callbacks' on_evaluate.
        """
        sets = self.eval_prompts if eval_dataset is None else {"": self._read(eval_dataset, "eval_dataset")}
        if not sets:
            raise UserError("eval_dataset: pass one to evaluate on")
        metrics: dict[str, float] = {}
        for name, prompts in sets.items():
            metrics |= evaluate(self.collector, prompts, f"{metric_key_prefix}_{name}" if name else metric_key_prefix)
        self.recorder.evaluation(self.state.global_step, metrics)
        self.state.log_history.append({"step": self.state.global_step, **metrics})
        self.callbacks.event("on_evaluate", metrics=metrics)
        return metrics

    def generate_completions(self, sampling: bool = False) -> list[Completion]:
        """Prompt, response and score over the evaluation sets at a temperature near 0; with sampling, one batch.

        They are written to completions.jsonl in output_dir and returned.
        """
        rows = [row for prompts in self.eval_prompts.values() for row in completions(self.collector, prompts, sampling)]
        if not rows:
            raise UserError("eval_dataset: pass one to complete")
        self.recorder.completions(rows)
        return rows

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Policy, tokenizer and model card. LoRA: the merged stock model, and the adapter in adapter/.

        The merged model alone where a peft_config came beside a policy with an adapter, which was merged first.
        """
        policy, folder = self.roles.trained.policy, Path(output_dir or self.folder)
        if self.empty_policy is not None:  # FSDP2's modules cannot be copied, so no adapter be merged into a copy
            main = self.accelerator.is_main_process
            weights = full_state_dict(policy, keep=main)
            policy = with_weights(self.empty_policy, weights) if main else self.empty_policy
        with self.collector.gathered_params() if self.empty_policy is None else nullcontext():
            save_policy(
                policy,
                self.processing_class,
                folder,
                self.accelerator,
                self._card_facts(),
                with_adapter=not self.roles.merged_first,
            )

    def push_to_hub(
        self, commit_message: str = "End of training", dataset_name: str | None = None, tags: Sequence[str] = ()
    ) -> str | None:
        """Save the policy to output_dir and upload it with a model card; returns the commit's address on rank 0."""
        self.save_model()
        facts = self._card_facts()
        return push_policy(self.folder, self.args, self.accelerator, commit_message, facts, dataset_name, tags)

    def _card_facts(self) -> RunFile:
        """What a model card can say where no stage of a run has left a run.json."""
        name = unwrap_peft(self.roles.trained.policy).config.name_or_path or None
        counts = {"split_train": len(self.prompts)} if self.prompts else {}
        config = {"model_name_or_path": name, **self.args.to_dict()}
        return {"config": config, "data": {"prompts": counts}, "models": self.models}

    def _read_data(self, train_dataset: Rows | None, eval_dataset: Rows | dict[str, Rows] | None) -> None:
        self.prompts = [] if train_dataset is None else self._read(train_dataset, "train_dataset")
        sets = eval_dataset if isinstance(eval_dataset, dict) else {} if eval_dataset is None else {"": eval_dataset}
        self.eval_prompts = {name: self._read(rows, f"eval_dataset {name}".strip()) for name, rows in sets.items()}

    def _read(self, rows: Rows, name: str) -> list[Prompt]:
        args = self.args
        limits = args.max_prompt_tokens, args.long_prompts
        prompts = read_prompts(rows, self.processing_class, *limits, name, args.chat_template_kwargs)
        ids = [prompt.input_ids for prompt in prompts]
        check_ids(self.roles.trained.policy, ids, name)
        longest = max(map(len, ids))
        for role, positions in self._positions().items():
            check_positions(args, positions, longest, name, role)
        for reward in self.rewards:
            if isinstance(reward, ModelReward) and reward.positions is not None:
                read = reward.longest(
                    [prompt.content for prompt in prompts], ids, [prompt.options for prompt in prompts]
                )
                check_positions(args, reward.positions, read, name, f"reward {reward.name}")
        return prompts

    def _positions(self) -> dict[str, int]:
        """How many tokens the models of policy, reference and critic have positions for, where they have a limit."""
        trained, reference = self.roles.trained, self.roles.reference
        own = {"model": trained.policy_base, "reference": reference.base, "critic": trained.critic_base}
        limits = {role: max_positions(m.config) for role, m in own.items() if not isinstance(m, ValueHead)}
        if self.args.use_vllm and self.args.vllm_mode == "colocate":
            limits["vllm_max_model_length"] = self.args.vllm_max_model_length
        return {role: limit for role, limit in limits.items() if limit is not None}

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
        self.callbacks.begin(first, self.num_total_batches, self.steps_per_epoch)
        if self.args.score_norm_samples and first == 0:
            self._fit_scores(self.args.score_norm_samples)
        if self.args.eval_on_start and first == 0:
            self.evaluate()

    def _fit_scores(self, n: int) -> None:
        if not self.prompts:
            raise UserError("score_norm_samples: pass a train_dataset to sample from")
        order = next(batches(self.prompts, n, self.args.seed, 1))
        scores, is_valid = self.collector.score_reference(order)
        mean, std = self.scaler.fit(scores, is_valid, lambda x: all_sum(self.accelerator, x))
        if self.accelerator.is_main_process:
            print(f"scores of the reference: mean {mean:.3f}, standard deviation {std:.3f}, {len(order)} responses")

    def _shows_samples(self, step: int) -> bool:
        wanted = min(self.args.num_sample_generations, self.num_total_batches)
        return wanted > 0 and (step == 1 or step % math.ceil(self.num_total_batches / wanted) == 0)

    def _bar(self, first: int) -> Any:
        return tqdm(
            total=self.num_total_batches,
            initial=first,
            desc="PPO",
            unit="step",
            disable=self.args.disable_tqdm or not self.accelerator.is_main_process,
        )
