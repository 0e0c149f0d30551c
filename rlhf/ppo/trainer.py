"""PPO (Ziegler et al. 2019, Stiennon et al. 2020) as a loop: act, judge, learn, record. Read `train` first."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, get_scheduler

from rlhf.config import PPOConfig
from rlhf.data.chat import decode_response, prepare_tokenizer
from rlhf.generation.engine import generate
from rlhf.generation.sampling import uniforms
from rlhf.models.load import stop_ids
from rlhf.models.lora import merged_model, save_adapter
from rlhf.ppo.kl_control import AdaptiveKLController
from rlhf.ppo.learner import Learner
from rlhf.ppo.metrics import metrics_row
from rlhf.ppo.prompts import Prompt, batches, read_prompts
from rlhf.ppo.roles import build_roles, describe_roles, optimizer_groups
from rlhf.ppo.rollout import Rollout, Targets, judge, observe, pack
from rlhf.runtime.checkpoint import load_checkpoint, save_checkpoint
from rlhf.runtime.distributed import all_sum, equal_share
from rlhf.runtime.tracking import Recorder


class PPOTrainer:
    """Proximal policy optimisation of a causal language model against a reward model.

    Arguments are TRL 1.12's. Rows of train_dataset have `prompt` (text or messages) or `input_ids`. The policy
    `model` is trained in place. Without ref_model the reference is the policy as it is now; without value_model
    the critic starts as the reward model. With a peft_config only adapters (and the critic's head) are trained.
    """

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None,
        reward_model: PreTrainedModel,
        train_dataset: Dataset | list[dict[str, Any]],
        value_model: PreTrainedModel | None = None,
        peft_config: LoraConfig | None = None,
    ) -> None:
        self.args = args
        self.accelerator = Accelerator(
            mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
            cpu=args.use_cpu,
            log_with=args.report_to or None,
            project_config=ProjectConfiguration(project_dir=args.output_dir),
        )
        set_seed(args.seed)
        self.processing_class = prepare_tokenizer(processing_class)
        self.prompts = read_prompts(train_dataset, self.processing_class, args.max_prompt_tokens)
        self.batch_size = args.local_batch_size * self.accelerator.num_processes
        self.num_total_batches = self._count_steps()
        self.eos_ids = stop_ids(model, processing_class) if args.stop_token_id is None else [args.stop_token_id]
        self.roles, self.frozen = build_roles(args, model, ref_model, reward_model, value_model, peft_config)
        self.models = describe_roles(self.roles, self.frozen, peft_config is not None)
        for frozen in (self.frozen.reference, self.frozen.reward):
            if frozen is not None:
                frozen.to(self.accelerator.device)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind(optimizer_groups(self.roles, args.weight_decay), **options)
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(self.num_total_batches),
            num_training_steps=self.num_total_batches,
        )
        self.model, self.optimizer = self.accelerator.prepare(self.roles, optimizer)
        # The scheduler counts PPO steps, so it is not prepared: Accelerate would step it once a process.
        self.accelerator.register_for_checkpointing(self.scheduler)
        self.learner = Learner(self.model, self.optimizer, self.accelerator, args)
        self.kl_control = AdaptiveKLController(args.kl_coef, args.kl_target or math.inf, args.kl_horizon)
        self.accelerator.register_for_checkpointing(self.kl_control)
        self.recorder = Recorder(self.accelerator, Path(args.output_dir or "."))

    def train(self, resume_from_checkpoint: str | Path | None = None) -> None:
        """Run all PPO steps; from a checkpoint folder, the steps after it."""
        first = load_checkpoint(self.accelerator, Path(resume_from_checkpoint)) if resume_from_checkpoint else 0
        self.recorder.start(self.args, first)
        self.episode = 0
        steps = batches(self.prompts, self.batch_size, self.args.seed, self.num_total_batches)
        with tqdm(
            total=self.num_total_batches,
            initial=first,
            desc="PPO",
            unit="step",
            disable=self.args.disable_tqdm or not self.accelerator.is_main_process,
        ) as bar:
            for step, batch in enumerate(steps, start=1):
                if step <= first:  # done before the run was cut
                    self.episode += len(batch)
                    continue
                self.timings: dict[str, float] = {}
                rollout, responses = self.act(step, batch)
                targets = self.judge(rollout)
                sums = self.learn(step, rollout, targets, len(batch))
                row = self.record(step, batch, rollout, targets, sums, responses)
                bar.set_postfix_str(f"reward {row['objective/scores']:.3f} kl {row['objective/kl_per_token']:.4f}")
                bar.update()
                self._maybe_save(step)
        self.recorder.end()

    def act(self, step: int, batch: list[Prompt]) -> tuple[Rollout, list[list[int]]]:
        """Sample this rank's share of responses, and look at them once with every role."""
        args = self.args
        part, real = equal_share(batch, self.accelerator)
        u = uniforms(args.seed, step, [prompt.prompt_id for prompt in part], args.response_length)
        self.roles.eval()
        with self._timed("generate"), self.accelerator.autocast():
            prompts = [prompt.input_ids for prompt in part]
            responses = generate(self.roles.policy, prompts, u, self.eos_ids, args.temperature)
        with self._timed("score"), self.accelerator.autocast():
            device = self.accelerator.device
            ended = torch.tensor([row[-1] in self.eos_ids for row in responses], device=device)
            packed = pack(prompts, responses, self.eos_ids[0], device)
            return observe(self.roles, self.frozen, packed, ended, real.to(device), args), responses

    def judge(self, rollout: Rollout) -> Targets:
        """Rewards to advantages, over all ranks."""
        return judge(rollout, self.kl_control.kl_coef, self.args, lambda x: all_sum(self.accelerator, x))

    def learn(self, step: int, rollout: Rollout, targets: Targets, n_global: int) -> dict[str, torch.Tensor]:
        """A few clipped steps."""
        with self._timed("learn"):
            place = torch.arange(len(rollout.ids)) * self.accelerator.num_processes + self.accelerator.process_index
            place[~rollout.real.cpu()] = -1
            sums = self.learner.learn(rollout, targets, place, n_global, step)
            self.lr = self.scheduler.get_last_lr()[0]
            self.scheduler.step()
        return sums

    def record(
        self,
        step: int,
        batch: list[Prompt],
        rollout: Rollout,
        targets: Targets,
        sums: dict[str, torch.Tensor],
        responses: list[list[int]],
    ) -> dict[str, float]:
        """One collective, one row; then the KL coefficient moves."""
        row = metrics_row(rollout, targets, sums, self.kl_control.kl_coef, self.args, self.accelerator)
        self.episode += len(batch)
        row |= {"lr": self.lr, "episode": self.episode, "epoch": self.episode / len(self.prompts)}
        row |= {f"time/{name}": seconds for name, seconds in self.timings.items()}
        row |= {"eps": len(batch) / sum(self.timings.values())}
        if self.args.kl_target is not None:
            self.kl_control.update(row["objective/kl_per_token"], len(batch))
        if step % max(1, int(self.args.logging_steps)) == 0 or step == self.num_total_batches:
            self.recorder.row(step, row)
        if self._shows_samples(step):
            self.recorder.samples(step, self._samples(batch, rollout, responses))
        return row

    def _maybe_save(self, step: int) -> None:
        args = self.args
        if args.save_strategy == "steps" and step % int(args.save_steps) == 0 and step < self.num_total_batches:
            save_checkpoint(self.accelerator, Path(args.output_dir or "."), step, args.save_total_limit)

    def _shows_samples(self, step: int) -> bool:
        wanted = min(self.args.num_sample_generations, self.num_total_batches)
        if wanted == 0:
            return False
        return step == 1 or step % math.ceil(self.num_total_batches / wanted) == 0

    def _samples(self, batch: list[Prompt], rollout: Rollout, responses: list[list[int]]) -> list[dict[str, Any]]:
        """The first few prompts of this rank's share with what was answered."""
        part, _ = equal_share(batch, self.accelerator)
        return [
            {
                "prompt_id": prompt.prompt_id,
                "prompt": prompt.text,
                "response": decode_response(self.processing_class, response),
                "score": score,
            }
            for prompt, response, score in zip(part[:4], responses, rollout.score[:4].tolist(), strict=False)
        ]

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Policy and tokenizer as safetensors. LoRA: the merged stock model, and the adapter in adapter/."""
        folder = Path(output_dir or self.args.output_dir or ".")
        policy = self.accelerator.unwrap_model(self.model).policy
        if self.accelerator.is_main_process:
            if isinstance(policy, PeftModel):
                save_adapter(policy, folder / "adapter")
                policy = merged_model(policy)
            policy.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
        self.accelerator.wait_for_everyone()

    def _count_steps(self) -> int:
        """PPO steps: max_steps, else total_episodes, else num_train_epochs over the prompts."""
        args = self.args
        if args.max_steps > 0:
            return args.max_steps
        if args.total_episodes is not None:
            return max(1, math.ceil(args.total_episodes / self.batch_size))
        # Epoch by epoch: each ends with its own partial batch.
        whole, rest = divmod(args.num_train_epochs, 1)
        per_epoch = math.ceil(len(self.prompts) / self.batch_size)
        return max(1, int(whole) * per_epoch + math.ceil(rest * len(self.prompts) / self.batch_size))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings[name] = time.perf_counter() - start
