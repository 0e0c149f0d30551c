"""PPO (Ziegler et al. 2019, Stiennon et al. 2020) as a loop: act, judge, learn, record. Read `train` first."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rlhf.config import PPOConfig
from rlhf.config.renamed import answers_old_names
from rlhf.data.chat import prepare_tokenizer
from rlhf.errors import UserError
from rlhf.models.actor_critic import is_quantised
from rlhf.ppo.actor import Actor, Experience
from rlhf.ppo.base import Rows, TrainerBase
from rlhf.ppo.export import without_weights
from rlhf.ppo.flow import Flow
from rlhf.ppo.kl_control import AdaptiveKLController
from rlhf.ppo.learner import Learner
from rlhf.ppo.metrics import metrics_row
from rlhf.ppo.prompts import Prompt, as_row, batches, read_prompts, response_ids
from rlhf.ppo.rewards import Reward, read_rewards, reward_sources, token_model
from rlhf.ppo.roles import build_roles, describe_roles
from rlhf.ppo.rollout import Rollout, Targets, judge
from rlhf.ppo.setup import (
    check_evaluation,
    check_shardable,
    clear_cache,
    count_steps,
    eos_ids,
    make_accelerator,
    make_optimizer,
)
from rlhf.ppo.warnings import Watch
from rlhf.ppo.warnings import line as warning_line
from rlhf.ppo.work import Meter, Work
from rlhf.reward.sources import RewardSource, TextReward, TokenReward
from rlhf.reward.vocabulary import check_value_model
from rlhf.runtime.distributed import all_sum, equal_share
from rlhf.runtime.engine import cast_weights, check_wrapped, is_deepspeed, is_fsdp
from rlhf.runtime.lock import one_writer
from rlhf.runtime.offload import check_given_optimizer
from rlhf.runtime.plain_weights import save_plain_weights
from rlhf.runtime.preemption import StopRequest
from rlhf.runtime.saver import Saver
from rlhf.runtime.skips import Skips
from rlhf.runtime.skips import line as skip_line
from rlhf.runtime.tracking import SKIPPED, WARNINGS, Recorder
from rlhf.runtime.trained_weights import frozen_norms


@answers_old_names
class PPOTrainer(TrainerBase):
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

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | PeftModel | None = None,
        reward_model: Reward | list[Reward] | None = None,
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
                f"data_collator: expected none, found {type(data_collator).__name__}: rows go in as they are"
            )
        check_evaluation(args, eval_dataset)
        self.args = args
        self.accelerator = make_accelerator(args)
        self.processing_class = prepare_tokenizer(processing_class)
        given = read_rewards(reward_model, reward_processing_classes, args.reward_weights, self.processing_class, model)
        check_value_model(value_model, self.processing_class, model)
        stop = eos_ids(args, model, processing_class)
        self.roles = build_roles(args, model, ref_model, token_model(given), value_model, peft_config)
        check_shardable(self.accelerator, self.roles.trained)
        self.roles.reference.to(self.accelerator.device)
        self.models = describe_roles(self.roles)
        self.roles.reference.to(self.accelerator.device)
        rewards = reward_sources(given, self.roles, self.processing_class, args, self.accelerator.device)
        self._read_data(train_dataset, eval_dataset)
        self.batch_size = args.local_batch_size * self.accelerator.num_processes
        self.num_total_batches = count_steps(args, len(self.prompts), self.batch_size)
        optimizer, self.scheduler = make_optimizer(args, self.roles.trained, optimizers, self.num_total_batches)
        if is_deepspeed(self.accelerator):
            check_given_optimizer(self.accelerator.state.deepspeed_plugin, optimizer)
        cast_weights(self.accelerator, [self.roles.trained, *self._frozen(rewards)])
        self.empty_policy = without_weights(self.roles.trained.policy) if is_fsdp(self.accelerator) else None
        self.model, self.optimizer = self.accelerator.prepare(self.roles.trained, optimizer)
        check_wrapped(self.accelerator, self.model)
        self.actor = Actor(args, self.roles, rewards, self.processing_class, stop, self.accelerator, self.model)
        self.kl_control = AdaptiveKLController(args.kl_coef, args.kl_target or math.inf, args.kl_horizon)
        # The scheduler counts PPO steps, so it is not prepared: Accelerate would step it once a process.
        save_plain_weights(self.accelerator)
        self.accelerator.register_for_checkpointing(self.scheduler, self.kl_control, self.actor.scaler)
        self.frozen = frozen_norms(self.roles.trained)
        self.saver = Saver(self.accelerator, self.folder, self.roles.trained)
        self.recorder = Recorder(self.accelerator, self.folder)
        shown = {"processing_class": processing_class, "optimizer": self.optimizer, "lr_scheduler": self.scheduler}
        main = self.accelerator.is_main_process
        self.flow = Flow(args, callbacks or [], main, model=self.roles.trained.policy, **shown)
        self.meter, self.work = Meter(self.actor), list[dict[str, Work]]()
        skips = Skips(args.max_skipped_updates, lambda row: self.recorder.event(SKIPPED, row, skip_line(row)))
        self.learner = Learner(self.model, self.optimizer, self.accelerator, args, self.flow.event, skips)
        self.watch = Watch(args, lambda row: self.recorder.event(WARNINGS, row, warning_line(row)))
        self.episode, self.timings = 0, dict[str, float]()
        self.stopped = self.save_is_due = False
        self.flow.event("on_init_end")

    def _frozen(self, rewards: Sequence[RewardSource]) -> list[Any]:
        """Models that are never trained, those with quantised weights left out."""
        roles = [self.roles.reference, *(s.role for s in rewards if isinstance(s, TokenReward | TextReward))]
        return [role.model for role in roles if not role.shared and not is_quantised(role.model)]

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> None:
        """Run all PPO steps; from a checkpoint folder, or with True from the run's newest, the steps after it.

        Told to stop by SIGUSR1 or SIGTERM, it ends the step it is in, or the first, saves a checkpoint and sets
        `stopped`. At its end it prints what `throughput` says. It is the only one that writes to output_dir.
        """
        for name, found in (("train_dataset", self.prompts), ("reward_model", self.actor.rewards)):
            if not found:
                raise UserError(f"{name}: expected one to train on, found none")
        with StopRequest() as request, one_writer(self.folder):
            first = self._resume(resume_from_checkpoint or self.args.resume_from_checkpoint)
            self._begin(first)
            with self.saver:
                self._loop(first, request)
            self.flow.event("on_train_end")
            self.recorder.end()
            self._say(self.throughput())
            if self.args.push_to_hub and not self.stopped:
                self.push_to_hub()

    def _loop(self, first: int, request: StopRequest) -> None:
        """All steps after the first ones, which were done before."""
        per_epoch = self.steps_per_epoch
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        with self._bar(first) as bar:
            for step, batch in enumerate(batches(self.prompts, self.batch_size, seed, self.num_total_batches), start=1):
                if step <= first:  # done before the run was cut
                    continue
                if step % per_epoch == 1 % per_epoch:
                    self.flow.event("on_epoch_begin")
                row = self._step(step, self.act(step, batch))
                bar.set_postfix_str(f"reward {row['objective/scores']:.3f} kl {row['objective/kl_per_token']:.4f}")
                bar.update()
                if step % per_epoch == 0:
                    self.flow.event("on_epoch_end")
                    self._obey(step, row)
                if self.flow.control.should_training_stop:
                    break
                if request.asked():
                    self._stop(step)
                    break

    def act(self, step: int, batch: list[Prompt]) -> Experience:
        """Sample this rank's share of responses, and look at them once with every role."""
        self.flow.event("on_step_begin")
        self.timings = {}
        part, real = equal_share(batch, self.accelerator)
        with self.actor.whole():
            with self._timed("generate"):
                responses = self.actor.sample(part, step)
            with self._timed("score"):
                rollout = self.actor.rollout(part, responses, real)
            names = [source.name for source in self.actor.rewards]
            return self.actor.experience(part, responses, rollout, len(batch), names)

    def judge(self, rollout: Rollout) -> Targets:
        """Rewards to advantages, over all ranks."""
        return judge(rollout, self.kl_control.kl_coef, self.args, lambda x: all_sum(self.accelerator, x))

    def learn(self, step: int, experience: Experience, targets: Targets) -> dict[str, Any]:
        """A few clipped steps."""
        with self._timed("learn"), self.actor.fast_frozen_layers():
            if experience.broken:
                return self.learner.leave_out(step, experience.broken)
            world, rank = self.accelerator.num_processes, self.accelerator.process_index
            places = (row * world + rank for row in range(len(experience.prompts)))
            positions = [place if place < experience.n_global else -1 for place in places]
            prompt_ids = [prompt.prompt_id for prompt in experience.prompts]
            tokens = [prompt.input_ids for prompt in experience.prompts], experience.responses
            rollout, n = experience.rollout, experience.n_global
            return self.learner.learn(rollout, targets, positions, n, step, prompt_ids, tokens)

    def record(self, step: int, experience: Experience, targets: Targets, sums: dict[str, Any]) -> dict[str, float]:
        """One collective, one row; then learning rate and KL coefficient move."""
        args, n, kl_coef = self.args, experience.n_global, self.kl_control.kl_coef
        work = self.meter.step(experience, self.learner.passes, self.timings)
        self.work.append(work)
        rewards = experience.rewards
        row = metrics_row(experience.rollout, targets, sums, kl_coef, args, self.accelerator, rewards, work)
        self.episode += n
        epoch = self.episode / max(len(self.prompts), 1)
        row |= {"lr": self.scheduler.get_last_lr()[0], "episode": self.episode, "epoch": epoch}
        row |= {f"time/{name}": seconds for name, seconds in self.timings.items()}
        row |= {"eps": n / max(sum(self.timings.values()), 1e-9)}
        self.scheduler.step()
        if args.kl_target is not None and not experience.broken:
            self.kl_control.update(row["objective/kl_per_token"], n)
        self.state.global_step, self.state.epoch = step, epoch
        return row

    def _step(self, step: int, experience: Experience) -> dict[str, float]:
        targets = self.judge(experience.rollout)
        row = self.record(step, experience, targets, self.learn(step, experience, targets))
        self.watch.look(step, row, experience.n_global)
        if self._shows_samples(step):
            self.recorder.samples(step, self._samples(experience))
        if self.args.torch_empty_cache_steps and step % self.args.torch_empty_cache_steps == 0:
            clear_cache(self.accelerator.device)
        self.flow.event("on_step_end")
        self._obey(step, row)
        return row

    def _obey(self, step: int, row: dict[str, float]) -> None:
        """Log, evaluate and save where the callbacks decided so."""
        if self.flow.take("log"):
            self.recorder.row(step, row)
            self.state.log_history.append({"step": step, **row})
            self.flow.event("on_log", logs=row)
        if self.flow.take("evaluate"):
            self.evaluate()
        if self._save_if_due(step) and self.args.push_to_hub and self.args.hub_strategy == "every_save":
            self.push_to_hub(f"Step {step}")

    def step(self, prompts: Sequence[Any], responses: Sequence[Any], scores: Sequence[Any]) -> dict[str, float]:
        """One PPO step on responses (token ids or texts) that the caller sampled and scored; returns its metrics.

        Each rank passes rows of its own, equally many on all ranks; the learning rate's schedule counts these
        calls. max_steps or total_episodes says for how many.
        """
        n = len(prompts)
        if not n or not n == len(responses) == len(scores):
            raise UserError(
                f"step: expected {n or 'some'} responses and scores, found {len(responses)} and {len(scores)}"
            )
        rows = [as_row(prompt, str(i)) for i, prompt in enumerate(prompts)]
        read = read_prompts(rows, self.processing_class, name="prompts")
        tokens = [response_ids(self.processing_class, p, responses[i], i) for i, p in enumerate(read)]
        column = torch.tensor([[float(score)] for score in scores], device=self.accelerator.device)
        if not self.recorder.is_open:
            self._begin(self.state.global_step)
        self.flow.event("on_step_begin")
        self.timings = {}
        with self._timed("score"):
            rollout = self.actor.rollout(read, tokens, torch.ones(n, dtype=torch.bool), column)
            experience = self.actor.experience(read, tokens, rollout, n * self.accelerator.num_processes, ["score"])
        return self._step(self.state.global_step + 1, experience)
