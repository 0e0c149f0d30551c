"""Where a reward comes from: a model over the policy's tokens, a model of another family, or a function."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.chat import Messages, decode_response, encode_prompt, encode_response, prompt_text, render
from rlhf.errors import UserError
from rlhf.models.actor_critic import FrozenRole, base_of
from rlhf.models.heads import has_token_head
from rlhf.reward.scoring import score_rows

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
