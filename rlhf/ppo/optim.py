"""Optimizer, parameter groups, schedule, and the number of PPO steps."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from rlhf.config import PPOConfig
from rlhf.config.schedule import check_given_schedule, make_schedule
from rlhf.errors import UserError
from rlhf.models.actor_critic import ActorCritic


def optimizer_groups(trained: ActorCritic, args: PPOConfig) -> list[dict[str, Any]]:
    """Parameter groups: policy and critic, each with its learning rate; weight decay for matrices only."""
    groups = []
    critic_rate = args.critic_learning_rate or args.learning_rate
    for role, part, rate in (
        ("policy", trained.policy, args.learning_rate),
        ("critic", trained.critic, critic_rate),
    ):
        shared = {"lr": rate, "role": role}
        parameters = [p for p in part.parameters() if p.requires_grad]
        groups += [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay, **shared},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, **shared},
        ]
    return [group for group in groups if group["params"]]


def make_optimizer(args: PPOConfig, trained: ActorCritic, given: tuple[Any, Any], steps: int) -> tuple[Any, Any]:
    """Optimizer and schedule over `steps` PPO steps; given: the user's own, None where there is none."""
    optimizer, scheduler = given
    if optimizer is None:
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        except (ValueError, ImportError) as error:  # unknown, not installed, or it needs the model itself
            raise UserError(f"optim: {args.optim} is unavailable: {error}") from error
        optimizer = kind(optimizer_groups(trained, args), **options)
    if scheduler is None:
        scheduler = make_schedule(args, optimizer, steps)
    else:
        check_given_schedule(scheduler)
    return optimizer, scheduler


@contextmanager
def options_as_set(optimizer: Any, scheduler: Any, kind: type) -> Iterator[None]:
    """What is loaded inside sets moments and the step; rates, decays and the schedule stay those of this run.

    kind: class of the optimizer, below what an engine has put around it. A user's own schedule, unless it is a
    LambdaLR, is as loaded, and its rates with it.
    """
    options = set(inspect.signature(kind).parameters) - {"params"}  # other entries of a group are the optimizer's state
    own_schedule = not isinstance(scheduler, LambdaLR)
    if own_schedule:
        options.discard("lr")
    kept = [{name: group[name] for name in options & group.keys()} for group in optimizer.param_groups]
    bases = scheduler.base_lrs
    yield
    for holder in (optimizer, scheduler.optimizer):
        for group, values in zip(holder.param_groups, kept, strict=True):
            group.update(values)
    if own_schedule:
        return
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(bases, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict(scheduler.state_dict() | {"base_lrs": bases, "_last_lr": rates})
    for holder in (optimizer, scheduler.optimizer):
        for group, base, rate in zip(holder.param_groups, bases, rates, strict=True):
            group.update(initial_lr=base, lr=rate)


def count_steps(args: PPOConfig, n_prompts: int, batch_size: int) -> int:
    """PPO steps: max_steps, else total_episodes, else num_train_epochs over the prompts."""
    if args.max_steps > 0:
        return args.max_steps
    if args.total_episodes is not None:
        return max(1, math.ceil(args.total_episodes / batch_size))
    # Epoch by epoch: each ends with its own partial batch.
    if n_prompts == 0:
        raise UserError("max_steps: set max_steps or total_episodes: there is no train_dataset to count steps by")
    whole, rest = divmod(args.num_train_epochs, 1)
    per_epoch = math.ceil(n_prompts / batch_size)
    return max(1, int(whole) * per_epoch + math.ceil(rest * n_prompts / batch_size))
