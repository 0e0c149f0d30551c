"""Arguments of PPO, under TRL 1.12's names."""

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch.optim import SGD
from transformers import TrainingArguments

from rlhf.config.batch import divide_global_batch
from rlhf.config.common import check_training, choose_hardware, help_text
from rlhf.config.schedule import make_schedule, schedule_kind
from rlhf.config.trackers import tracker_names
from rlhf.config.training_args import refuse_ignored, refuse_renamed
from rlhf.errors import UserError

_AT_LEAST_1 = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_mini_batches",
    "num_ppo_epochs",
    "response_length",
    "local_rollout_forward_batch_size",
    "max_skipped_updates",
)
_POSITIVE = ("temperature", "cliprange", "cliprange_value", "kl_horizon")
_POSITIVE_OR_NONE = (
    "kl_target",
    "target_kl",
    "score_clip",
    "critic_learning_rate",
    "max_prompt_tokens",
    "micro_batch_tokens",
    "save_minutes",
    "global_batch_size",
)
_NOT_NEGATIVE = (
    "learning_rate",
    "critic_warmup_steps",
    "score_norm_samples",
    "num_sample_generations",
    "kl_coef",
    "vf_coef",
)
_FRACTIONS = ("gamma", "lam")


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of `PPOTrainer`: those of `TrainingArguments`, and those of TRL 1.12's `PPOConfig` by name.

    global_batch_size is the number of prompts of a PPO step over all processes: with it a run is the same run on any
    number of them. gradient_accumulation_steps follows from it. Without it, as in TRL, a rank's rollout is
    per_device_train_batch_size, the micro-batch, times gradient_accumulation_steps, and more processes make larger
    steps. An optimizer step sees rollout / num_mini_batches. A step, in max_steps, logging_steps, warmup_steps and so
    on, is a PPO step: one rollout and its updates.

    A row of metrics has of each phase (generate, score, learn) its seconds as time/PHASE, and over all ranks
    perf/PHASE/tokens_per_second (response tokens sampled; in score and learn, those of prompts and responses, once
    for each time that policy and critic read them), perf/PHASE/padding (per cent of the token positions computed by
    all models that were padding, or rows that had ended) and perf/PHASE/limit (0 to 1: the time that it would take
    at this machine's matrix-product peak and, for decoding, memory bandwidth, as measured at the first step, over
    the time that it took).
    """

    learning_rate: float = help_text("peak learning rate of policy and critic", 3e-6)
    logging_steps: float = help_text("PPO steps between two rows of metrics", 1)
    gradient_checkpointing: bool = help_text("recompute activations to save memory; a third more to compute", True)
    bf16: bool | None = help_text(  # type: ignore[assignment]
        "bf16 autocast; not set: where the hardware has it"
    )
    report_to: None | str | list[str] = help_text("where to log: tensorboard, none, ...", "tensorboard")  # noqa: RUF036
    remove_unused_columns: bool = help_text("never: every column stays, for reward functions", False)
    logging_nan_inf_filter: bool = help_text("never: numbers are written as they are", False)
    dataset_num_proc: int | None = help_text("for scripts that tokenise with datasets; the trainer needs none")
    global_batch_size: int | None = help_text(
        "prompts per PPO step, over all processes; gradient_accumulation_steps follows from it and from the number of "
        "processes, and per_device_train_batch_size is lowered to a process's share where that is smaller; not set: "
        "per_device_train_batch_size x gradient_accumulation_steps x processes"
    )
    num_mini_batches: int = help_text("optimizer steps per pass over a rollout", 1)
    total_episodes: int | None = help_text("responses to sample in all; num_train_epochs is used when not set")
    local_rollout_forward_batch_size: int = help_text("rows per forward pass without gradients, per rank", 64)
    num_sample_generations: int = help_text("how often sample responses are logged over the run; 0 is never", 10)
    response_length: int = help_text("most tokens of a response", 53)
    stop_token: Literal["eos"] | None = help_text("responses stop at the model's EOS ids, set or not")
    stop_token_id: int | None = help_text("stop at this id instead")
    temperature: float = help_text("softmax temperature of sampling and of every log-prob", 0.7)
    missing_eos_penalty: float | None = help_text("subtracted from the score of a response cut at response_length")
    close_truncated: bool = help_text("reward models see an EOS after a cut response: they know finished ones", False)
    sft_model_path: str = help_text("for scripts: the model to start from", "EleutherAI/pythia-160m")
    reward_model_path: str | None = help_text("for scripts: the reward model", "EleutherAI/pythia-160m")
    model_adapter_name: str | None = help_text("the adapter of the policy that is trained, where it has several")
    ref_adapter_name: str | None = help_text("the adapter of the policy that is the reference")
    num_ppo_epochs: int = help_text("passes over each rollout", 4)
    whiten_rewards: bool = help_text("scale per-token rewards to standard deviation 1, mean kept", False)
    whiten_advantages: bool = help_text("scale advantages to mean 0 and standard deviation 1 over all ranks", True)
    kl_coef: float = help_text("reward units per nat of KL; with kl_target, where it starts", 0.05)
    kl_estimator: Literal["k1", "k3"] = help_text("k1 or k3 (Schulman 2020)", "k1")
    kl_target: float | None = help_text("nats per token; set it for the adaptive KL coefficient")
    kl_horizon: float = help_text("samples; how slowly the adaptive coefficient moves", 10000)
    target_kl: float | None = help_text("nats per token; an update stops once it moved the policy 1.5 times as far")
    micro_batch_tokens: int | None = help_text(
        "most tokens, padding included, of a forward and backward pass; rows are packed up to it, in place of "
        "per_device_train_batch_size at a time; results do not depend on it, perf/learn/padding does"
    )
    max_skipped_updates: int = help_text(
        "the run ends after this many updates in a row whose numbers are not finite; fewer are left out and logged", 10
    )
    cliprange: float = help_text("clip of the probability ratio", 0.2)
    vf_coef: float = help_text("weight of the value loss", 0.1)
    cliprange_value: float = help_text("clip of the value's change, reward units", 0.2)
    gamma: float = help_text("discount per token", 1.0)
    lam: float = help_text("lambda of the advantage estimate", 0.95)
    bootstrap_truncated: bool = help_text("a cut response is worth the critic's value at the cut, not 0", False)
    cuda_graphs: bool | None = help_text("replay the decoding step as a captured CUDA graph; not set: on CUDA")
    critic: Literal["separate", "shared"] = help_text("a model of its own, or a head on the policy's trunk", "separate")
    critic_learning_rate: float | None = help_text("the critic's peak learning rate; learning_rate when not set")
    critic_warmup_steps: int = help_text("first PPO steps in which only the critic learns", 0)
    reward_weights: list[float] | None = help_text("weight of each reward, in the order given; 1 when not set")
    score_norm_samples: int = help_text(
        "responses of the reference that set the scores' mean to 0 and deviation to 1 before PPO; 0 is off",
        0,
    )
    use_score_scaling: bool = help_text("divide scores by their running standard deviation", False)
    use_score_norm: bool = help_text("with use_score_scaling: subtract the running mean, too", False)
    score_clip: float | None = help_text("scores are clipped to plus or minus this, after scaling")
    max_prompt_tokens: int | None = help_text("tokens of a prompt; not set: no limit")
    long_prompts: Literal["refuse", "drop", "truncate"] = help_text(
        "what happens to prompts over max_prompt_tokens; truncate keeps the end", "refuse"
    )
    save_minutes: float | None = help_text(
        "a checkpoint, too, at the end of the step in which so many minutes have passed since the last one"
    )
    ds3_gather_for_generation: bool = help_text("ZeRO-3: gather the policy once a rollout; it always is", True)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Before the fields are set: a field of an older TRL is answered by its new name."""
        refuse_renamed(kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check_numbers()
        check_training(self)
        refuse_ignored(self)
        if self.stop_token is not None and self.stop_token_id is not None:
            raise UserError(f"stop_token_id: expected none beside stop_token, found {self.stop_token_id}")
        if not self.ds3_gather_for_generation:
            raise UserError(
                "ds3_gather_for_generation: expected True, found False: generation token by token is slower"
            )
        if self.save_strategy == "best":
            raise UserError("save_strategy: expected no, steps or epoch, found best")
        if self.hub_strategy not in ("end", "every_save"):
            raise UserError(f"hub_strategy: expected end or every_save, found {self.hub_strategy}")
        divide_global_batch(self)
        self._check_division()
        choose_hardware(self)
        schedule_kind(self)
        trackers = tracker_names(self.report_to)
        super().__post_init__()
        self._check_horizon()
        self.report_to = trackers  # what transformers makes of `all` and of its surroundings is not all known here
        make_schedule(self, SGD([torch.zeros(1, requires_grad=True)], self.learning_rate), max(self.max_steps, 1))

    def _check_numbers(self) -> None:
        def check(names: tuple[str, ...], holds: Any, expected: str) -> None:
            for name in names:
                if not holds(getattr(self, name)):
                    raise UserError(f"{name}: expected {expected}, found {getattr(self, name)}")

        check(_AT_LEAST_1, lambda x: x >= 1, "at least 1")
        check(_POSITIVE, lambda x: x > 0, "a positive number")
        check(_POSITIVE_OR_NONE, lambda x: x is None or x > 0, "a positive number or none")
        check(_NOT_NEGATIVE, lambda x: x >= 0, "0 or more")
        check(_FRACTIONS, lambda x: 0 <= x <= 1, "a number from 0 to 1")

    def _check_division(self) -> None:
        rows, parts = self.local_batch_size, self.num_mini_batches
        if rows % parts:
            near = [n for n in range(1, min(rows, 10_000) + 1) if rows % n == 0]
            below, above = (
                max(n for n in near if n < parts or n == 1),
                min((n for n in near if n > parts), default=rows),
            )
            raise UserError(
                "num_mini_batches: expected a divisor of per_device_train_batch_size x gradient_accumulation_steps "
                f"= {rows}, such as {below} or {above}, found {parts}"
            )

    def _check_horizon(self) -> None:
        # Ziegler et al. 2019, eq. 4, multiplies by 1 - 0.2 x samples / horizon at least, which has to stay positive.
        least = 0.2 * self.batch_size
        if self.kl_target is not None and self.kl_horizon <= least:
            raise UserError(
                f"kl_horizon: expected more than 0.2 x {self.batch_size} samples a step = {least:g}, "
                f"found {self.kl_horizon:g}"
            )

    @property
    def n_gpu(self) -> int:
        """Devices of this process: one at most, however many it sees. transformers' DataParallel is for more."""
        return min(super().n_gpu, 1)

    @property
    def local_batch_size(self) -> int:
        """Prompts per rank and PPO step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def batch_size(self) -> int:
        """Prompts per PPO step, over all ranks."""
        return self.local_batch_size * self.world_size

    @property
    def micro_batch_size(self) -> int:
        """Rows per forward and backward pass, over all ranks."""
        return self.per_device_train_batch_size * self.world_size

    @property
    def local_mini_batch_size(self) -> int:
        """Rows per optimizer step and rank."""
        return self.local_batch_size // self.num_mini_batches

    @property
    def mini_batch_size(self) -> int:
        """Rows per optimizer step, over all ranks."""
        return self.batch_size // self.num_mini_batches


@dataclass
class PPOStageConfig(PPOConfig):
    """PPOConfig as a stage of a run takes it, with the reference recipe's values as defaults."""

    output_dir: str | None = help_text("set from RUNS_DIR/RUN/ppo_full or ppo_lora")
    dry_run: bool = help_text("check data, models and folder, print steps and memory per device, and end", False)
    reward_model_path: str | None = help_text("trained reward model; RUNS_DIR/RUN/reward when not set")
    sft_model_path: str | None = help_text(  # type: ignore[assignment]
        "not taken: model_name_or_path is the model to start from"
    )
    eval_prompts: int = help_text(
        "with eval_strategy or eval_on_start: prompts taken out of the training prompts to evaluate on",
        16,
    )
    trust_remote_code: bool = help_text("run code that a model or tokenizer brings along", False)
    learning_rate: float = help_text("peak learning rate of policy and critic", 1e-5)
    response_length: int = help_text("most tokens of a response", 128)
    gradient_checkpointing: bool = help_text("recompute activations to save memory; a third more to compute", False)

    def __post_init__(self) -> None:
        if self.sft_model_path is not None:
            raise UserError(f"sft_model_path: expected model_name_or_path in its place, found {self.sft_model_path!r}")
        if self.do_predict or (self.do_eval and self.eval_strategy == "no"):
            name = "do_predict" if self.do_predict else "do_eval"
            raise UserError(f"{name}: expected false, found true: eval_strategy says when to evaluate")
        if self.eval_prompts < 1:
            raise UserError(f"eval_prompts: expected at least 1, found {self.eval_prompts}")
        super().__post_init__()
