"""Arguments of PPO, with TRL 1.12's names."""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from rlhf.config.batch import divide_global_batch
from rlhf.config.common import check_training
from rlhf.config.fields import help_list, help_text
from rlhf.config.old_names import OLD_NAMES, refuse_unknown
from rlhf.config.training_args import REFUSED, refuse_ignored
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
    "vllm_server_port",
    "vllm_group_port",
    "vllm_tensor_parallel_size",
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
    "vllm_max_model_length",
)
_NOT_NEGATIVE = (
    "learning_rate",
    "critic_warmup_steps",
    "score_norm_samples",
    "num_sample_generations",
    "kl_coef",
    "vf_coef",
    "vllm_server_timeout",
)
_FRACTIONS = ("gamma", "lam", "vllm_gpu_memory_utilization")


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of `PPOTrainer`: those of `TrainingArguments`, and those of TRL 1.12's `PPOConfig` by name.

    Batch sizes: global_batch_size is the number of prompts per PPO step over all processes. If it is set, results do
    not depend on the number of processes, and gradient_accumulation_steps follows from it. If not, as in TRL, each
    rank's rollout has per_device_train_batch_size (the micro-batch) x gradient_accumulation_steps prompts, and more
    processes make larger steps. An optimizer step uses rollout / num_mini_batches. "Step" in max_steps, logging_steps,
    warmup_steps and so on means a PPO step: one rollout and its updates.

    Metrics of the phases generate, score and learn: time/PHASE in seconds; over all ranks
    perf/PHASE/tokens_per_second (generate: sampled response tokens; score and learn: prompt and response tokens, once
    for each time that policy and critic read them), perf/PHASE/padding (per cent of the computed token positions that
    were padding or rows that had ended) and perf/PHASE/limit (0 to 1: ideal time over measured time; the ideal is this
    machine's matrix-product peak and, for decoding, memory bandwidth, measured at the first step).
    """

    learning_rate: float = help_text("peak learning rate of policy and critic", 3e-6)
    optim: OptimizerNames | str = help_text("optimizer, by transformers' names", "adamw_torch_fused")
    logging_steps: float = help_text("PPO steps between two rows of metrics", 1)
    gradient_checkpointing: bool = help_text("recompute activations to save memory; a third more computation", True)
    bf16: bool | None = help_text(  # type: ignore[assignment]
        "bf16 autocast; default: on a CPU if it is measured to be 1.2 times as fast, elsewhere if the hardware has it"
    )
    fp32_master_weights: bool = help_text(
        "what is trained is float32, also if it is loaded in 16 bit, which would round most steps away", True
    )
    report_to: None | str | list[str] = help_text("where to log: tensorboard, none, ...", "tensorboard")  # noqa: RUF036
    remove_unused_columns: bool = help_text("always False: reward functions get all columns", False)
    logging_nan_inf_filter: bool = help_text("always False: numbers are logged as they are", False)
    dataset_num_proc: int | None = help_text(
        "for scripts that tokenise with datasets: processes; the trainer does not use it; default: none"
    )
    global_batch_size: int | None = help_text(
        "prompts per PPO step, over all processes; sets gradient_accumulation_steps, and lowers "
        "per_device_train_batch_size where a process's share is smaller; default: both of these x processes"
    )
    num_mini_batches: int = help_text("optimizer steps per pass over a rollout", 1)
    total_episodes: int | None = help_text("responses to sample in total; default: by num_train_epochs")
    local_rollout_forward_batch_size: int = help_text("rows per forward pass without gradients, per rank", 64)
    num_sample_generations: int = help_text("how many times per run sample responses are logged; 0: never", 10)
    response_length: int = help_text("maximum tokens per response", 53)
    stop_token: Literal["eos"] | None = help_text(
        "eos is what always holds: responses stop at the model's EOS ids; default: the same"
    )
    stop_token_id: int | None = help_text("stop at this token id instead; default: the EOS ids")
    temperature: float = help_text("softmax temperature of sampling and of every log-prob", 0.7)
    missing_eos_penalty: float | None = help_text(
        "reward units to subtract from the score of a truncated response; default: none"
    )
    close_truncated: bool = help_text("append EOS to truncated responses for reward models", False)
    sft_model_path: str = help_text("for scripts: the model to start from", "EleutherAI/pythia-160m")
    reward_model_path: str | None = help_text("for scripts: the reward model", "EleutherAI/pythia-160m")
    model_adapter_name: str | None = help_text("adapter to train, if the policy has several; default: the active one")
    ref_adapter_name: str | None = help_text(
        "adapter of the policy to use as reference; default: the policy without adapters"
    )
    num_ppo_epochs: int = help_text("passes over each rollout", 4)
    whiten_rewards: bool = help_text("scale per-token rewards to standard deviation 1, mean kept", False)
    whiten_advantages: bool = help_text("scale advantages to mean 0 and standard deviation 1 over all ranks", True)
    kl_coef: float = help_text("reward units per nat of KL; with kl_target, the initial value", 0.05)
    kl_estimator: Literal["k1", "k3"] = help_text("k1 or k3 (Schulman 2020)", "k1")
    kl_target: float | None = help_text(
        "target KL in nats per token; makes the KL coefficient adaptive; default: kl_coef is fixed"
    )
    kl_horizon: float = help_text("how slowly the adaptive coefficient moves, in samples", 10000)
    target_kl: float | None = help_text(
        "stop an update early when approximate KL > 1.5 x target_kl (nats per token); default: never"
    )
    micro_batch_tokens: int | None = help_text(
        "maximum tokens, padding included, per forward and backward pass; replaces per_device_train_batch_size as the "
        "limit of a micro-batch; does not change results, but perf/learn/padding; default: no limit"
    )
    max_skipped_updates: int = help_text(
        "end the run after this many updates in a row with numbers that are not finite; each is skipped and logged", 10
    )
    cliprange: float = help_text("clip range of the probability ratio around 1", 0.2)
    vf_coef: float = help_text("weight of the value loss beside the policy loss", 0.1)
    cliprange_value: float = help_text("clip range of value changes, in reward units", 0.2)
    gamma: float = help_text("discount per token", 1.0)
    lam: float = help_text("lambda of the advantage estimate, per token", 0.95)
    bootstrap_truncated: bool = help_text("bootstrap truncated responses from the critic's value", False)
    cuda_graphs: bool | None = help_text("replay the decoding step as a CUDA graph; default: on CUDA")
    use_vllm: bool = help_text("sample responses by vLLM, which needs GPUs", False)
    vllm_mode: Literal["server", "colocate"] = help_text(
        "server: `vllm serve` runs elsewhere; colocate: vLLM runs in the training processes, on their GPUs", "colocate"
    )
    vllm_server_base_url: str | None = help_text(
        "with server: its address, http://HOST:PORT; default: of vllm_server_host and vllm_server_port"
    )
    vllm_server_host: str = help_text("with server: its host", "0.0.0.0")
    vllm_server_port: int = help_text("with server: its port", 8000)
    vllm_server_timeout: float = help_text("with server: seconds to wait for it before training", 240.0)
    vllm_group_port: int = help_text("with server: port of this host over which weights are sent", 51216)
    vllm_gpu_memory_utilization: float = help_text("with colocate: share of each GPU's memory for vLLM", 0.3)
    vllm_max_model_length: int | None = help_text(
        "with colocate: maximum tokens of prompt and response; default: the model's"
    )
    vllm_tensor_parallel_size: int = help_text("with colocate: GPUs that share a model; divides the processes", 1)
    critic: Literal["separate", "shared"] = help_text("a separate model, or a head on the policy's trunk", "separate")
    critic_learning_rate: float | None = help_text("the critic's peak learning rate; default: learning_rate")
    critic_warmup_steps: int = help_text("number of first PPO steps that train only the critic", 0)
    reward_weights: list[float] | None = help_text("weight of each reward, in their order; default: 1 each")
    score_norm_samples: int = help_text(
        "before PPO, scale scores to mean 0 and standard deviation 1 on this many responses of the reference; 0: off",
        0,
    )
    use_score_scaling: bool = help_text("divide scores by their running standard deviation", False)
    use_score_norm: bool = help_text("with use_score_scaling, also subtract the running mean", False)
    score_clip: float | None = help_text(
        "clip scores to plus or minus this many reward units, after scaling; default: no limit"
    )
    max_prompt_tokens: int | None = help_text("maximum tokens per prompt; default: no limit")
    long_prompts: Literal["refuse", "drop", "truncate"] = help_text(
        "what to do with prompts over max_prompt_tokens; truncate keeps their end", "refuse"
    )
    chat_template_kwargs: dict[str, Any] | None = help_text(
        'arguments of the chat template for all prompts, such as {"enable_thinking": false}; default: none'
    )
    save_minutes: float | None = help_text(
        "also save a checkpoint at the end of a step if this many minutes have passed since the last one; "
        "default: by save_steps alone"
    )
    ds3_gather_for_generation: bool = help_text("always True: ZeRO-3 gathers the policy once per rollout", True)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An old name of a field is a UserError with its new one, before dataclasses would raise a TypeError."""
        refuse_unknown(kwargs, (field.name for field in fields(cls)), "PPOConfig", OLD_NAMES)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        import torch  # here and not above, as what follows: the help of commands does without
        from torch.optim import SGD

        from rlhf.config.precision import choose_hardware
        from rlhf.config.schedule import make_schedule, schedule_kind
        from rlhf.config.trackers import tracker_names

        self._check_numbers()
        check_training(self)
        refuse_ignored(self)
        if self.stop_token is not None and self.stop_token_id is not None:
            raise UserError(f"stop_token_id: set it or stop_token, not both; found {self.stop_token_id}")
        if not self.ds3_gather_for_generation:
            raise UserError("ds3_gather_for_generation: expected True, found False: gathering for each token is slower")
        if self.save_strategy == "best":
            raise UserError("save_strategy: expected no, steps or epoch, found best")
        if self.hub_strategy not in ("end", "every_save"):
            raise UserError(f"hub_strategy: expected end or every_save, found {self.hub_strategy}")
        self._check_vllm()
        self._choose_best()
        divide_global_batch(self)
        self._check_division()
        choose_hardware(self)
        schedule_kind(self)
        trackers = tracker_names(self.report_to)
        super().__post_init__()
        self._check_horizon()
        self.report_to = trackers  # not transformers' own reading of it, which may add trackers
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
        check(("reward_weights",), lambda x: all(map(math.isfinite, x or [])), "finite numbers")

    def _check_vllm(self) -> None:
        if self.vllm_mode not in ("server", "colocate"):
            raise UserError(f"vllm_mode: expected server or colocate, found {self.vllm_mode}")
        url = self.vllm_server_base_url
        if url is not None and not url.startswith(("http://", "https://")):
            raise UserError(f"vllm_server_base_url: expected http://HOST:PORT, found {url!r}")
        if self.use_vllm and not 0.01 <= self.temperature <= 2:
            raise UserError(
                f"temperature: expected 0.01 to 2 with use_vllm, which are vLLM's limits, found {self.temperature:g}"
            )

    def _choose_best(self) -> None:
        """What the best checkpoint is: transformers' defaults are for a loss."""
        if self.load_best_model_at_end:
            self.metric_for_best_model = self.metric_for_best_model or "eval_scores"
            if self.save_strategy == "no" or self.eval_strategy != self.save_strategy:
                raise UserError(
                    "load_best_model_at_end: expected eval_strategy and save_strategy both steps or both epoch, found "
                    f"{self.eval_strategy} and {self.save_strategy}"
                )
            every = self.eval_steps or self.logging_steps
            if self.save_strategy == "steps" and min(every, self.save_steps) >= 1 and self.save_steps % every:
                raise UserError(
                    f"save_steps: expected a multiple of eval_steps {every:g} with load_best_model_at_end, "
                    f"found {self.save_steps:g}"
                )
        name = self.metric_for_best_model
        if name is not None and self.eval_strategy == "no":
            raise UserError(f"metric_for_best_model: set eval_strategy, without which there is no {name}")
        if name is not None and self.greater_is_better is None:
            if not name.endswith(("scores", "reward", "mean")):
                raise UserError(f"greater_is_better: expected true or false with metric_for_best_model {name!r}")
            self.greater_is_better = True

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
        # Ziegler et al. 2019, eq. 4: the factor can be as low as 1 - 0.2 x samples / horizon, and must stay positive.
        least = 0.2 * self.batch_size
        if self.kl_target is not None and self.kl_horizon <= least:
            raise UserError(
                f"kl_horizon: expected more than 0.2 x {self.batch_size} samples per step = {least:g}, "
                f"found {self.kl_horizon:g}"
            )

    @property
    def n_gpu(self) -> int:
        """Devices of this process: at most one, so that transformers does not use its DataParallel."""
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
    """PPOConfig for a stage of a run, with the defaults of the reference recipe."""

    output_dir: str | None = help_text("always the default: RUNS_DIR/RUN/ppo_full or ppo_lora")
    dry_run: bool = help_text("check data, models and folder, print steps and memory, then exit", False)
    reward_model_path: str | None = help_text(
        "trained reward model; default: RUNS_DIR/RUN/reward, or none if there are rewards"
    )
    rewards: list[str] = help_list(
        "reward functions, each module:function or file.py:function; reward_weights weighs them, after the reward "
        "model's; default: none"
    )
    sft_model_path: str | None = help_text(  # type: ignore[assignment]
        "not supported: use model_name_or_path; default: none"
    )
    eval_prompts: int = help_text(
        "with eval_strategy or eval_on_start: number of training prompts held out for evaluation",
        16,
    )
    trust_remote_code: bool = help_text("run code that comes with a model or tokenizer", False)
    learning_rate: float = help_text("peak learning rate of policy and critic", 1e-5)
    response_length: int = help_text("maximum tokens per response", 128)
    gradient_checkpointing: bool = help_text("recompute activations to save memory; a third more computation", False)

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset(REFUSED)  # a value of these is refused

    def __post_init__(self) -> None:
        if self.sft_model_path is not None:
            raise UserError(f"sft_model_path: use model_name_or_path instead; found {self.sft_model_path!r}")
        if self.do_predict or (self.do_eval and self.eval_strategy == "no"):
            name = "do_predict" if self.do_predict else "do_eval"
            raise UserError(f"{name}: expected false, found true: use eval_strategy")
        if self.eval_prompts < 1:
            raise UserError(f"eval_prompts: expected at least 1, found {self.eval_prompts}")
        super().__post_init__()
