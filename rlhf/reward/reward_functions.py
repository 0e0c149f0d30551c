"""Reward functions: what scores completions, and how a user's `reward_model` argument becomes a list of them."""

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from rlhf.config import PPOConfig
from rlhf.data.chat import (
    Messages,
    Options,
    answered,
    continues,
    decode_response,
    decode_rest,
    encode_dialogue,
    encode_prompt,
    encode_response,
    end_id,
    prompt_text,
)
from rlhf.errors import UserError
from rlhf.models.actor_critic import FrozenRole, widen_heads
from rlhf.models.adapters import with_adapters
from rlhf.models.unwrap import Model, max_positions, unwrap_peft
from rlhf.perf.work import TextPasses
from rlhf.reward.calls import Logged, accepted, as_scores, call
from rlhf.reward.scoring import has_token_head, run_passes, score_passes
from rlhf.reward.tokenizers import tokenizer_to_read

_FROM_TRAINER = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")

RewardModelOrFunction = PreTrainedModel | PeftModel | Callable[..., Any]  # what users pass, one of them or several


@dataclass(frozen=True)
class Completions:
    """A batch of B prompts with their responses, in every form that a reward function may read."""

    prompts: list[str | Messages]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    ended: list[bool]  # False where the response was truncated: it has no EOS
    columns: list[dict[str, Any]]  # the other columns of each prompt's row
    options: Sequence[Options] = ()  # of each prompt's chat template; none: no options
    end_is_text: bool = False  # the token that ended a response is a part of its text: a stop_token_id

    @property
    def said(self) -> list[list[int]]:
        """The responses without the token that ended them."""
        return said(self.response_ids, self.ended, self.end_is_text)


def said(responses: list[list[int]], ended: list[bool], end_is_text: bool = False) -> list[list[int]]:
    """Responses without the token that ended them: which one it was says nothing about a response."""
    rows = zip(responses, ended, strict=True)
    return [ids[:-1] if has_end and not end_is_text else ids for ids, has_end in rows]


class ModelReward(ABC):
    """A sequence-classification model as a reward: what it reads is planned first, and then scored."""

    def __init__(self, name: str, role: FrozenRole, batch_size: int) -> None:
        self.name, self.role, self.batch_size = name, role, batch_size
        self.positions = max_positions(role.base.config)  # tokens that the model reads at most; None without a limit
        for name_of, part in role.base.named_modules():
            pad = getattr(part, "padding_idx", None) if name_of.endswith("position_embeddings") else None
            if self.positions is not None and pad is not None:
                self.positions -= pad + 1  # RoBERTa's begin behind the one of the pad token

    @abstractmethod
    def encode(self, completions: Completions) -> list[list[int]]:
        """The token ids that the model reads."""

    def longest(
        self, prompts: Sequence[str | Messages], prompt_ids: list[list[int]], options: Sequence[Options] = ()
    ) -> int:
        """Tokens that the model reads of the longest of these prompts, before any response."""
        n = len(prompts)
        empty = Completions(list(prompts), prompt_ids, [[]] * n, [False] * n, [{}] * n, options)
        return max(map(len, self.encode(empty)))

    def plan(self, completions: Completions) -> TextPasses:
        """The model's texts, and which go through it together. A UserError for one that is too long for the model."""
        texts, limit = self.encode(completions), self.positions
        found = max(map(len, texts), default=0)
        if limit is not None and found > limit:  # a text may have more tokens in another tokenizer
            raise UserError(
                f"reward {self.name}: expected prompt and response of at most {limit} tokens, found {found}; "
                "lower max_prompt_tokens or response_length"
            )
        return TextPasses(texts, score_passes(self.role.base, texts, self.batch_size))

    def score(self, planned: TextPasses) -> Tensor:
        """float32 [B], on the model's device."""
        with self.role.active():
            return run_passes(self.role.base, *planned)

    def __call__(self, completions: Completions) -> Tensor:
        """Plan, then score."""
        return self.score(self.plan(completions))


class TokenReward(ModelReward):
    """A sequence-classification model that reads the policy's own token ids.

    end_id: what finished responses end with in its training rows; None: read them as they were sampled.
    close_truncated: end truncated responses, too.
    """

    def __init__(
        self, name: str, role: FrozenRole, batch_size: int, end_id: int | None = None, close_truncated: bool = False
    ) -> None:
        super().__init__(name, role, batch_size)
        self.end_id, self.close_truncated = end_id, close_truncated

    def encode(self, completions: Completions) -> list[list[int]]:
        """Prompt and response ids, ended as in training whichever token ended them."""
        c = completions
        if self.end_id is None:
            return [prompt + ids for prompt, ids in zip(c.prompt_ids, c.response_ids, strict=True)]
        return [
            prompt + said + ([self.end_id] if ended or self.close_truncated else [])
            for prompt, said, ended in zip(c.prompt_ids, c.said, c.ended, strict=True)
        ]


class TextReward(ModelReward):
    """A sequence-classification model of another tokenizer family: it reads the text in its own tokens.

    A decoder reads prompt and response in its own chat template. Any other model reads them as its tokenizer joins
    a pair (`[CLS] prompt [SEP] response [SEP]`, all of one token type), or in its chat template if it has one. It reads
    what it was trained on: a turn without white space around it, but text that goes on with the prompt as it is.
    tokenizer: the reward model's; policy_tokenizer: decodes the responses; append_eos: to truncated responses, too
    (decoders only).
    """

    def __init__(
        self,
        name: str,
        role: FrozenRole,
        batch_size: int,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        append_eos: bool = False,
    ) -> None:
        super().__init__(name, role, batch_size)
        self.tokenizer, self.policy_tokenizer, self.append_eos = tokenizer, policy_tokenizer, append_eos
        self.is_decoder = has_token_head(role.model)
        if self.positions is not None and not self.is_decoder:  # the tokenizer may know of fewer: RoBERTa skips some
            self.positions = min(self.positions, tokenizer.model_max_length)

    def encode(self, completions: Completions) -> list[list[int]]:
        """The decoded texts in the reward model's tokens."""
        c = completions
        texts = [
            (decode_rest if continues(prompt) else decode_response)(self.policy_tokenizer, ids)
            for prompt, ids in zip(c.prompts, c.said, strict=True)
        ]
        encode = self._encode_for_decoder if self.is_decoder else self._encode_pair
        options = c.options or [{}] * len(texts)
        return [encode(*row) for row in zip(c.prompts, texts, options, c.ended, strict=True)]

    def _encode_for_decoder(self, prompt: str | Messages, text: str, options: Options, ended: bool) -> list[int]:
        response = encode_response(self.tokenizer, prompt, text, options)
        start = encode_prompt(self.tokenizer, prompt, options)
        return start + (response if ended or self.append_eos else response[:-1])

    def _encode_pair(self, prompt: str | Messages, text: str, options: Options, ended: bool) -> list[int]:
        if isinstance(prompt, str):
            return self._pair(prompt, text)
        dialogue = answered(prompt, text)
        if self.tokenizer.chat_template:
            return encode_dialogue(self.tokenizer, dialogue, options)
        return self._pair(prompt_text(dialogue[:-1]), prompt_text(dialogue[-1:]))

    def _pair(self, prompt: str, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(prompt, text.strip(), split_special_tokens=True)["input_ids"]
        return ids


class FunctionReward:
    """A Python function with the signature of TRL's `reward_funcs`, async or not.

    f(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **columns) -> B numbers. It gets those
    of the arguments that it takes. Completions are texts, or for conversational prompts lists of one assistant message.
    None means no score for this row. A NaN that the function returns is an error.
    """

    def __init__(self, name: str, function: Callable[..., Any], tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.function, self.tokenizer = name, function, tokenizer
        self.state = TrainerState()  # what the function gets as `trainer_state`

    def check(self, columns: Iterable[str]) -> None:
        """A UserError if the function takes an argument that neither the trainer nor the rows of prompts have."""
        accepted(self.name, self.function, dict.fromkeys([*_FROM_TRAINER, *columns]))

    def ask(self, completions: Completions, logged: Logged) -> Callable[[], Tensor]:
        """Call the function; the result waits for it and returns float32 [B] on the CPU.

        A UserError if it does not return B numbers.
        """
        count = len(completions.prompts)
        texts: list[Any] = [decode_response(self.tokenizer, ids, strip=False) for ids in completions.said]
        if not isinstance(completions.prompts[0], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        columns = sorted(set().union(*completions.columns))
        given: dict[str, Any] = {name: [_own(row.get(name)) for row in completions.columns] for name in columns}
        given |= {
            "prompts": [_own(prompt) for prompt in completions.prompts],
            "completions": texts,
            "completion_ids": [list(ids) for ids in completions.response_ids],
            "trainer_state": self.state,
            "log_metric": logged.metric,
            "log_extra": lambda column, values: logged.extra(column, values, count, self.name),
        }
        result = call(self.name, self.function, accepted(self.name, self.function, given))
        return lambda: as_scores(self.name, result(), count)

    def __call__(self, completions: Completions) -> Tensor:
        """Ask, then wait."""
        return self.ask(completions, Logged())()


def _own(value: Any) -> Any:
    """A copy of what a function may change: others read it, too, and later steps."""
    return copy.deepcopy(value) if isinstance(value, list | dict) else value


Reward = ModelReward | FunctionReward


def weighted_sum(scores: Tensor, weights: Tensor, abstains: Tensor) -> Tensor:
    """float [B, K] by weights float [K] -> [B]; the NaN of a function adds nothing to its row.

    abstains: bool [K], True for functions. The NaN of a model, where it is False, makes the sum NaN.
    """
    return (torch.where(scores.isnan() & abstains, 0, scores) * weights).sum(dim=1)


@dataclass(frozen=True)
class RewardSpec:
    """One of the rewards that a user passes, with its name and tokenizer."""

    name: str
    reward: Any  # a model or a function
    tokenizer: PreTrainedTokenizerBase | None  # of a model of another family; None: it reads the policy's ids

    @property
    def is_model(self) -> bool:
        """True for a model, False for a function."""
        return isinstance(self.reward, PreTrainedModel | PeftModel)


def resolve_rewards(
    reward_model: RewardModelOrFunction | Sequence[RewardModelOrFunction] | None,
    tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None,
    weights: Sequence[float] | None,
    policy_tokenizer: PreTrainedTokenizerBase,
    policy: Model,
) -> list[RewardSpec]:
    """The rewards in order, each with a name of its own; a UserError for an unfit one or lists of unequal length.

    A reward model for which `tokenizers` has none is read with the tokenizer saved beside it; see `tokenizer_to_read`.
    """
    rewards: list[Any] = _as_list(reward_model)
    kinds: list[Any] = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(rewards)
    for name, values in (("reward_processing_classes", kinds), ("reward_weights", weights)):
        if values is not None and len(values) != len(rewards):
            raise UserError(f"{name}: expected {len(rewards)} values, one per reward, found {len(values)}")
    names = [_checked_name(reward) for reward in rewards]
    count = Counter(names)
    names = [f"{name}_{i}" if count[name] > 1 else name for i, name in enumerate(names)]
    specs = [RewardSpec(*row) for row in zip(names, rewards, kinds, strict=True)]
    return [_made_readable(spec, policy_tokenizer, policy) if spec.is_model else spec for spec in specs]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _checked_name(reward: Any) -> str:
    if isinstance(reward, PreTrainedModel | PeftModel):
        model = unwrap_peft(reward)
        kind = type(model)
        is_users_class = not kind.__module__.startswith("transformers.") and hasattr(model, "score")
        if not is_users_class and "ForSequenceClassification" not in kind.__name__:
            raise UserError(f"reward_model: expected a sequence-classification model, found {kind.__name__}")
        if model.config.num_labels != 1:
            raise UserError(f"reward_model: expected a head with 1 label, found {model.config.num_labels}")
        return Path(model.config.name_or_path or "reward").name
    if isinstance(reward, torch.nn.Module | type) or not callable(reward):
        found = f"the class {reward.__name__}" if isinstance(reward, type) else type(reward).__name__
        raise UserError(
            "reward_model: expected a sequence-classification model or a function of (prompts, completions, ...), "
            f"found {found}"
        )
    function = reward.func if isinstance(reward, partial) else reward
    return getattr(function, "__name__", type(function).__name__)


def _made_readable(spec: RewardSpec, policy_tokenizer: PreTrainedTokenizerBase, policy: Model) -> RewardSpec:
    """A model's adapters in its layers, since it is read below its PEFT model; and the tokenizer it is read with."""
    name = f"reward_model {spec.name}"
    model = with_adapters(name, spec.reward)
    tokenizer = tokenizer_to_read(name, model, spec.tokenizer, policy_tokenizer, policy)
    return replace(spec, reward=model, tokenizer=tokenizer)


def first_token_model(specs: Sequence[RewardSpec]) -> Model | None:
    """The first model that reads the policy's token ids: a critic can start from it."""
    return next((spec.reward for spec in specs if spec.is_model and spec.tokenizer is None), None)


def build_reward_functions(
    specs: Sequence[RewardSpec],
    role: FrozenRole | None,
    policy_tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
    device: torch.device,
) -> list[Reward]:
    """One reward function per spec, models on the device. role: that of the first token model, if PPO has one."""
    batch_size, first = args.local_rollout_forward_batch_size, first_token_model(specs)
    functions: list[Reward] = []
    for spec in specs:
        if not spec.is_model:
            functions.append(FunctionReward(spec.name, spec.reward, policy_tokenizer))
            continue
        own = role if spec.reward is first and role is not None else FrozenRole(spec.reward)
        own.to(device)
        widen_heads(own.model)
        functions.append(
            model_reward(spec.name, own, spec.tokenizer, policy_tokenizer, batch_size, args.close_truncated)
        )
    return functions


def model_reward(
    name: str,
    role: FrozenRole,
    tokenizer: PreTrainedTokenizerBase | None,
    policy_tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    append_eos: bool,
) -> TokenReward | TextReward:
    """The reward function of a model.

    tokenizer: the result of `tokenizer_to_read`, None for the policy's own; append_eos: to truncated responses.
    """
    if tokenizer is None:
        return TokenReward(name, role, batch_size, end_id(policy_tokenizer), append_eos)
    return TextReward(name, role, batch_size, tokenizer, policy_tokenizer, append_eos)
