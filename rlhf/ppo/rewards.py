"""What a user passes as `reward_model`: models and functions, named, checked and turned into reward sources."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import PPOConfig
from rlhf.errors import UserError
from rlhf.models.actor_critic import FrozenRole, Model, base_of
from rlhf.ppo.roles import Roles
from rlhf.reward.sources import FunctionReward, RewardSource, model_reward
from rlhf.reward.vocabulary import tokenizer_to_read

Reward = PreTrainedModel | PeftModel | Callable[..., Any]


@dataclass(frozen=True)
class Given:
    """One reward as it was passed."""

    name: str
    reward: Any
    tokenizer: PreTrainedTokenizerBase | None  # of a model of another family; None: it reads the policy's ids

    @property
    def is_model(self) -> bool:
        """A model, not a function."""
        return isinstance(self.reward, PreTrainedModel | PeftModel)


def read_rewards(
    given: Reward | Sequence[Reward] | None,
    tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None,
    weights: Sequence[float] | None,
    policy: PreTrainedTokenizerBase,
    model: Model,
) -> list[Given]:
    """One entry a reward, in order; what cannot be one, or a list of another length, is a UserError.

    policy, model: the policy's tokenizer and itself. A reward model without a tokenizer here is asked for the one
    saved beside it; see `tokenizer_to_read`.
    """
    rewards: list[Any] = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    kinds: list[Any] = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(rewards)
    for name, found in (("reward_processing_classes", kinds), ("reward_weights", weights)):
        if found is not None and len(found) != len(rewards):
            raise UserError(f"{name}: expected {len(rewards)}, one a reward, found {len(found)}")
    names = [_checked_name(reward) for reward in rewards]
    count = Counter(names)
    names = [f"{name}_{i}" if count[name] > 1 else name for i, name in enumerate(names)]
    all_given = [Given(*row) for row in zip(names, rewards, kinds, strict=True)]
    return [
        replace(g, tokenizer=tokenizer_to_read(f"reward_model {g.name}", g.reward, g.tokenizer, policy, model))
        if g.is_model
        else g
        for g in all_given
    ]


def token_model(rewards: Sequence[Given]) -> Model | None:
    """The first model that reads the policy's token ids: a critic can start from it."""
    return next((r.reward for r in rewards if r.is_model and r.tokenizer is None), None)


def reward_sources(
    rewards: Sequence[Given], roles: Roles, policy: PreTrainedTokenizerBase, args: PPOConfig, device: torch.device
) -> list[RewardSource]:
    """The rewards as things that score. The first token model is the reward role; the others are their own."""
    size, first = args.local_rollout_forward_batch_size, token_model(rewards)
    sources: list[RewardSource] = []
    for given in rewards:
        if not given.is_model:
            sources.append(FunctionReward(given.name, given.reward, policy))
            continue
        role = roles.reward if given.reward is first and roles.reward is not None else FrozenRole(given.reward)
        role.to(device)
        sources.append(model_reward(given.name, role, given.tokenizer, policy, size, args.close_truncated))
    return sources


def _checked_name(reward: Any) -> str:
    if isinstance(reward, PreTrainedModel | PeftModel):
        inner = base_of(reward)
        kind = type(inner)
        own = not kind.__module__.startswith("transformers.") and hasattr(inner, "score")  # a user's class
        if not own and "ForSequenceClassification" not in kind.__name__:
            raise UserError(f"reward_model: expected a sequence-classification model, found {kind.__name__}")
        if inner.config.num_labels != 1:
            raise UserError(f"reward_model: expected a head with 1 label, found {inner.config.num_labels}")
        return Path(inner.config.name_or_path or "reward").name
    if isinstance(reward, torch.nn.Module) or not callable(reward):
        raise UserError(
            "reward_model: expected a sequence-classification model or a function of (prompts, completions, ...), "
            f"found {type(reward).__name__}"
        )
    return getattr(reward, "__name__", type(reward).__name__)
