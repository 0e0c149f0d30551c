"""The settings of stages and commands that transformers has no class for: typed, with units, checked when created.

It imports neither torch nor transformers, so that the help of a command is quick.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config.fields import at_least, check, check_plain_name, check_seeds, help_list, help_text
from rlhf.console.quiet import VERBOSE


@dataclass
class RunConfig:
    """Where a run lives."""

    run: str = help_text("name of the run; stages write to RUNS_DIR/RUN/STAGE", "default")
    runs_dir: str = help_text("folder that holds all runs", "runs")
    verbose: bool = help_text("show what libraries print, which otherwise goes to RUNS_DIR/RUN/logs", False)

    def __post_init__(self) -> None:
        check_plain_name("run", self.run)
        if self.verbose:
            os.environ[VERBOSE] = "1"

    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs_dir) / self.run

    def place(self) -> dict[str, str]:
        """The run's name, as run.json has it; not its place, since it may be moved."""
        return {"run": self.run}


@dataclass
class StageRunConfig(RunConfig):
    """A stage of a run."""

    redo: bool = help_text("run again from its start what was run with other settings; its earlier results go", False)


@dataclass
class PreferenceConfig:
    """Preference pairs."""

    dataset_name: str = help_text(
        "hub id, or a local file or folder of preference pairs in a layout of docs/data.md", "Anthropic/hh-rlhf"
    )
    dataset_dir: str | None = help_text(
        "folder of the data set, or a pattern of its files, e.g. data/train*; default: all"
    )
    dataset_columns: list[str] = help_list(
        "columns of other names, each as FIELD=COLUMN, e.g. prompt=question chosen=better; default: none"
    )
    dataset_revision: str | None = help_text("branch, tag or commit of the hub data set; default: the newest")
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

    prompt_dataset: list[str] = help_list(
        "hub ids and/or local files or folders of prompts, in the layouts of docs/data.md", "OpenAssistant/oasst1"
    )
    prompt_dir: str | None = help_text("folder of the data set, or a pattern of its files; default: all")
    prompt_columns: list[str] = help_list(
        "columns of other names, each as FIELD=COLUMN, e.g. prompt=problem; default: none"
    )
    prompt_revision: str | None = help_text("branch, tag or commit of the hub data set; default: the newest")
    language: str | None = help_text("language to keep; lines without a language are kept", "en")
    max_prompt_length: int = help_text("tokens per prompt; longer prompts are dropped and counted", 256)
    train_prompts: int = help_text("prompts to train on; fewer if the data have fewer", 1000)
    evaluation_prompts: int = help_text("prompts held out for evaluation", 50)
    rating_prompts: int = help_text("prompts held out for human rating", 10)
    prompt_seed: int = help_text("seed of sampling and split", 0)

    def __post_init__(self) -> None:
        at_least(self, 1, "max_prompt_length", "train_prompts", "evaluation_prompts")
        at_least(self, 0, "rating_prompts")


@dataclass
class EvaluationConfig:
    """Responses of several models to unseen prompts, and their scores."""

    base_model: str = help_text(
        "the untouched model: hub id, folder, GGUF or pypi: name", "openai-community/gpt2-medium"
    )
    reward_model_path: str | None = help_text(
        "reward model that scores; default: RUNS_DIR/RUN/reward, or none if there are rewards"
    )
    rewards: list[str] = help_list(
        "reward functions that score, each module:function or file.py:function; default: none"
    )
    reward_weights: list[float] | None = help_text("weight of each reward, the reward model's first; default: 1 each")
    chat_template_kwargs: dict[str, Any] | None = help_text(
        "arguments of the chat template for all prompts, as in PPO; default: none"
    )
    eval_batch_size: int = help_text("prompts per device and generation", 16)
    eval_response_length: int = help_text("maximum tokens per response", 128)
    eval_close_truncated: bool = help_text("append EOS to truncated responses for reward models", False)
    eval_temperature: float = help_text("softmax temperature of sampling; all models get the same random numbers", 0.7)
    eval_seed: int = help_text("seed of sampling and of the bootstrap", 0)
    confidence: float = help_text("confidence level of the intervals, 0 to 1", 0.95)
    eval_tf32: bool = help_text("TF32 matrix products on GPUs that support them", True)
    eval_precision: Literal["fp32", "bf16", "auto"] = help_text(
        "of the models' passes; auto: bf16 where a training stage would take it by itself", "fp32"
    )
    ddp_timeout: int = help_text("maximum seconds that a process waits for the others, as in training", 1800)

    def __post_init__(self) -> None:
        check(self, lambda x: 0 < x < 1, "a number between 0 and 1", "confidence")
        check(self, lambda x: all(map(math.isfinite, x)), "finite numbers", "reward_weights")
        at_least(self, 1, "eval_batch_size", "eval_response_length", "ddp_timeout")
        check(self, lambda x: x > 0, "a positive number", "eval_temperature")
        check_seeds(self, "eval_seed")


@dataclass
class ReportConfig:
    """Heading of the report, and the runs of a report over several seeds."""

    title: str | None = help_text("heading; default: the run's name")
    author: str | None = help_text("name under the heading; default: none")
    runs: list[str] = help_list(
        "names of runs under RUNS_DIR, one per seed: RUNS_DIR/RUN/report/seeds.html reports on all; default: none"
    )

    def __post_init__(self) -> None:
        for name in self.runs:
            check_plain_name("runs", name)


@dataclass
class RatingConfig:
    """Blind human rating of the responses to the rating prompts."""

    rating_repeats: int = help_text("prompts that are shown twice, to measure each rater's consistency", 2)
    files: list[str] = help_list("import: the files that raters saved; default: only what `serve` stored")
    port: int = help_text("serve: port on 127.0.0.1; 0: any free one", 0)
    rating_confidence: float = help_text("confidence level of the intervals, 0 to 1", 0.95)
    rating_seed: int = help_text("seed of the bootstrap", 0)

    def __post_init__(self) -> None:
        check(self, lambda x: 0 <= x < 65536, "0 to 65535", "port")
        check(self, lambda x: 0 < x < 1, "a number between 0 and 1", "rating_confidence")
        at_least(self, 0, "rating_repeats")
        check_seeds(self, "rating_seed")
