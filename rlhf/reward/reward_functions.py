"""What a user passes as `reward_model`: models and functions, named, checked and turned into reward sources."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import PPOConfig
from rlhf.data.chat import Messages, decode_response, encode_prompt, encode_response, prompt_text, render
from rlhf.errors import UserError
from rlhf.models.actor_critic import FrozenRole
from rlhf.models.unwrap import Model, base_of, has_token_head
from rlhf.reward.scoring import score_rows
from rlhf.reward.tokenizers import tokenizer_to_read

RewardModel = PreTrainedModel | PeftModel

RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Finished:
    """B prompts with their responses, as any kind of reward may want them."""

    prompts: list[str | Messages]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    ended: list[bool]  # False where the response was cut
    columns: list[dict[str, Any]]  # what else the row of the data set holds


class RewardSource(Protocol):
    """Anything that scores finished responses."""

    name: str

    def __call__(self, finished: Finished) -> Tensor:
        """float32 [B], of a function on the CPU, of a model on its device; NaN is a function's "no opinion"."""
        ...


class TokenReward:
    """A sequence-classification model that reads the policy's own token ids.

    close: the id that it sees after a response that was cut; None for none.
    """

    def __init__(self, name: str, role: FrozenRole, batch_size: int, close: int | None = None) -> None:
        self.name, self.role, self.batch_size = name, role, batch_size
        self.close = [] if close is None else [close]
        self.rows: list[list[int]] = []  # token ids last scored

    def __call__(self, finished: Finished) -> Tensor:
        """Scores of prompt and response ids."""
        rows = [
            prompt + response + ([] if ended else self.close)
            for prompt, response, ended in zip(finished.prompt_ids, finished.response_ids, finished.ended, strict=True)
        ]
        self.rows = rows
        with self.role.active() as model:
            return score_rows(model, rows, self.batch_size)


class TextReward:
    """A sequence-classification model of another tokenizer family: the text, in its own tokens.

    A decoder reads prompt and response in its own chat template. Any other model reads them as its tokenizer joins
    a pair (`[CLS] prompt [SEP] response [SEP]`, all of one token type), or in a chat template that it came with.
    """

    def __init__(
        self,
        name: str,
        role: FrozenRole,
        tokenizer: PreTrainedTokenizerBase,
        policy: PreTrainedTokenizerBase,
        size: int,
        close: bool = False,
    ) -> None:
        """close: a response that was cut gets an EOS, too; only decoders know one."""
        self.close = close
        self.name, self.role, self.tokenizer, self.policy, self.batch_size = name, role, tokenizer, policy, size
        self.is_decoder = has_token_head(role.model)
        self.rows: list[list[int]] = []  # token ids last scored

    def __call__(self, finished: Finished) -> Tensor:
        """Scores of the decoded texts; a response that was cut gets no EOS, unless told so."""
        texts = [decode_response(self.policy, ids) for ids in finished.response_ids]
        read = self._decoder_row if self.is_decoder else self._pair_row
        rows = [read(*row) for row in zip(finished.prompts, texts, finished.ended, strict=True)]
        self.rows = rows
        with self.role.active() as model:
            return score_rows(model, rows, self.batch_size)

    def _decoder_row(self, prompt: str | Messages, text: str, ended: bool) -> list[int]:
        response = encode_response(self.tokenizer, prompt, text)
        return encode_prompt(self.tokenizer, prompt) + (response if ended or self.close else response[:-1])

    def _pair_row(self, prompt: str | Messages, text: str, ended: bool) -> list[int]:
        if self.tokenizer.chat_template and not isinstance(prompt, str):
            whole = [*prompt, {"role": "assistant", "content": text}]
            ids: list[int] = self.tokenizer(render(self.tokenizer, whole), add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(prompt_text(prompt), text)["input_ids"]
        config = base_of(self.role.model).config
        most = getattr(config, "max_position_embeddings", None) or 0
        if most > 0 and getattr(config, "position_biased_input", True):  # others know distances only
            most = min(most, self.tokenizer.model_max_length)
            if len(ids) > most:
                raise UserError(
                    f"reward {self.name}: expected prompt and response of at most {most} tokens, found {len(ids)}; "
                    "see max_prompt_tokens and response_length"
                )
        return ids


class FunctionReward:
    """A function as TRL's `reward_funcs`: f(prompts, completions, completion_ids, **columns) -> B numbers.

    Completions are texts, or for conversational prompts lists of one assistant message. None is no opinion. NaN is
    a number gone wrong, and counts as inf does; NaN itself stands for None in a column.
    """

    def __init__(self, name: str, function: RewardFunction, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.function, self.tokenizer = name, function, tokenizer

    def __call__(self, finished: Finished) -> Tensor:
        """Whatever the function says, as numbers."""
        completions: list[Any] = [decode_response(self.tokenizer, ids) for ids in finished.response_ids]
        if not isinstance(finished.prompts[0], str):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        names = sorted(set().union(*finished.columns))
        values = self.function(
            prompts=finished.prompts,
            completions=completions,
            completion_ids=finished.response_ids,
            **{name: [row.get(name) for row in finished.columns] for name in names},
        )
        values = list(values)
        if len(values) != len(completions):
            raise UserError(f"reward {self.name}: expected {len(completions)} numbers, found {len(values)}")
        return torch.tensor([math.nan if value is None else _opinion(float(value)) for value in values])


def _opinion(value: float) -> float:
    return math.inf if math.isnan(value) else value


def weighted(scores: Tensor, weights: Tensor, abstains: Tensor) -> Tensor:
    """float [B, K] by weights float [K] -> [B]; a source without an opinion on a row adds nothing to it.

    abstains: bool [K], sources whose NaN is no opinion; that of another, a model, makes the sum NaN.
    """
    return (torch.where(scores.isnan() & abstains, 0, scores) * weights).sum(dim=1)


def model_reward(
    name: str,
    role: FrozenRole,
    tokenizer: PreTrainedTokenizerBase | None,
    policy: PreTrainedTokenizerBase,
    size: int,
    close: bool,
) -> TokenReward | TextReward:
    """A model as a source. tokenizer: what `tokenizer_to_read` says; size: rows a pass; close: EOS after a cut."""
    if tokenizer is None:
        return TokenReward(name, role, size, policy.eos_token_id if close else None)
    return TextReward(name, role, tokenizer, policy, size, close)


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
    rewards: Sequence[Given],
    role: FrozenRole | None,
    policy: PreTrainedTokenizerBase,
    args: PPOConfig,
    device: torch.device,
) -> list[RewardSource]:
    """The rewards as things that score. role: of the first token model, where PPO has one; the others are their own."""
    size, first = args.local_rollout_forward_batch_size, token_model(rewards)
    sources: list[RewardSource] = []
    for given in rewards:
        if not given.is_model:
            sources.append(FunctionReward(given.name, given.reward, policy))
            continue
        own = role if given.reward is first and role is not None else FrozenRole(given.reward)
        own.to(device)
        sources.append(model_reward(given.name, own, given.tokenizer, policy, size, args.close_truncated))
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
