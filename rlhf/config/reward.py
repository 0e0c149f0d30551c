"""Arguments of the reward model's training: TRL's RewardConfig with the reference recipe's defaults."""

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from transformers.training_args import OptimizerNames
from trl import RewardConfig

from rlhf.config.batch import divide_global_batch
from rlhf.config.common import check_training
from rlhf.config.fields import at_least, check, help_text
from rlhf.config.old_names import REMOVED, refuse_unknown
from rlhf.errors import UserError

# `None | str | list[str]` below: transformers' argument parser reads the members of a union in this order.


@dataclass
class RewardStageConfig(RewardConfig):
    """TRL's RewardConfig with the margin ranking loss and the defaults of the reference recipe."""

    output_dir: str | None = help_text("always the default: RUNS_DIR/RUN/reward or reward_gold")
    dry_run: bool = help_text("check data, models and folder, print steps and memory, then exit", False)
    loss_type: Literal["margin", "bradley_terry"] = help_text(
        "margin: max(0, margin - (chosen - rejected)); bradley_terry: -log sigmoid(chosen - rejected)",
        "margin",
    )
    margin: float = help_text("margin of the ranking loss, reward units", 1.0)
    chat_template_kwargs: dict[str, Any] | None = help_text(
        "arguments of the chat template for all pairs, as in PPO; default: none"
    )
    learning_rate: float = help_text("AdamW's peak learning rate", 5e-5)
    optim: OptimizerNames | str = help_text("optimizer, by transformers' names", "adamw_torch_fused")
    per_device_train_batch_size: int = help_text("pairs per device and forward pass", 8)
    global_batch_size: int | None = help_text(
        "pairs per optimizer step, over all processes; sets gradient_accumulation_steps, and lowers "
        "per_device_train_batch_size where a process's share is smaller; default: both of these x processes"
    )
    num_train_epochs: float = help_text("passes over the pairs", 3.0)
    eval_strategy: str = help_text("when to compute the validation loss: epoch or steps", "epoch")
    gradient_checkpointing: bool = help_text("recompute activations to save memory", False)
    logging_nan_inf_filter: bool = help_text("ignore numbers that are not finite in the validation loss", False)
    fp32_master_weights: bool = help_text(
        "what is trained is float32, also if it is loaded in 16 bit, which would round most steps away", True
    )
    max_skipped_updates: int = help_text(
        "end the run after this many updates in a row with numbers that are not finite; each is skipped and logged", 10
    )
    report_to: None | str | list[str] = help_text("where to log: tensorboard, none, ...", "tensorboard")  # noqa: RUF036

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An old name of a field is a UserError with its new one, before dataclasses would raise a TypeError."""
        refuse_unknown(kwargs, (field.name for field in fields(cls)), "RewardStageConfig", REMOVED)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # Here and not above: they import torch, and the help of commands does without.
        from rlhf.config.precision import choose_hardware
        from rlhf.config.trackers import check_integrations

        check_training(self)
        at_least(self, 1, "max_skipped_updates", "global_batch_size")
        divide_global_batch(self)
        if self.loss_type == "margin" and not self.margin > 0:
            raise UserError(f"margin: expected a positive number, found {self.margin}")
        check(self, lambda x: x >= 2, "at least 2 tokens", "max_length")
        check_integrations(self.report_to)
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
