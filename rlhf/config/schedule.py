"""The learning-rate schedule; wrong arguments are a UserError."""

import inspect
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from rlhf.errors import UserError

_BY_METRIC = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_WITHOUT_OPTIONS = (
    SchedulerType.CONSTANT,
    SchedulerType.CONSTANT_WITH_WARMUP,
)  # get_scheduler ignores their options


def schedule_kind(args: TrainingArguments) -> SchedulerType:
    """`lr_scheduler_type`; a UserError if it does not depend on the step alone."""
    found = args.lr_scheduler_type
    known = [kind.value for kind in SchedulerType if kind not in _BY_METRIC]
    kind = SchedulerType(found) if found in [*SchedulerType] else None
    if kind is None or kind in _BY_METRIC:
        why = "" if kind is None else ", which needs a metric"
        raise UserError(
            f"lr_scheduler_type: expected one of {', '.join(known)}, found {getattr(found, 'value', found)}{why}"
        )
    return kind


def make_schedule(args: TrainingArguments, optimizer: Optimizer, steps: int) -> Any:
    """The schedule of `lr_scheduler_type` over that many steps; a UserError if its options are wrong."""
    kind, options = schedule_kind(args), cast(dict[str, Any] | None, args.lr_scheduler_kwargs)
    if kind in _WITHOUT_OPTIONS and options:
        raise UserError(f"lr_scheduler_kwargs: expected none with lr_scheduler_type {kind.value}, found {options}")
    if kind == SchedulerType.CONSTANT and args.warmup_steps:
        raise UserError(
            f"warmup_steps: expected 0 with lr_scheduler_type constant, found {args.warmup_steps}: "
            "use constant_with_warmup"
        )
    try:
        return get_scheduler(
            kind,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=options,
        )
    except (TypeError, ValueError) as error:  # a missing, unknown or invalid option
        raise UserError(
            f"lr_scheduler_kwargs: expected those of lr_scheduler_type {kind.value}, found {options}: "
            f"{' '.join(str(error).split())}"
        ) from error


def check_given_schedule(scheduler: Any) -> None:
    """A UserError for a user's schedule whose step() needs a metric."""
    needs = [p for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty]
    if isinstance(scheduler, ReduceLROnPlateau) or any(p.kind is p.POSITIONAL_OR_KEYWORD for p in needs):
        raise UserError(
            f"optimizers: expected a schedule that depends on the step alone, found {type(scheduler).__name__}, "
            "which needs a metric"
        )
