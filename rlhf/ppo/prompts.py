"""Rows of a prompt data set as token ids, and the order in which PPO sees them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy

from rlhf.config import PPOConfig
from rlhf.data.chat import Messages, Options, decode_response, encode_prompt, encode_response, prompt_text
from rlhf.data.layouts import OPTIONS, template_options
from rlhf.data.sources import checked_text
from rlhf.errors import UserError
from rlhf.models.load import stop_ids
from rlhf.models.unwrap import unwrap_peft

_OWN = ("prompt", "messages", "input_ids", "attention_mask", "prompt_id", *OPTIONS)


@dataclass(frozen=True)
class Prompt:
    """One prompt; its columns go to reward functions."""

    prompt_id: str
    input_ids: list[int]
    content: str | Messages  # as in the row, or what is left of it; decoded if the row has token ids
    columns: dict[str, Any]
    stream: str  # names its random numbers: each row's own, also where two rows have the same prompt_id
    options: Options = field(default_factory=dict)  # of the chat template

    @property
    def text(self) -> str:
        """As a person reads it."""
        return prompt_text(self.content)


def read_prompts(
    rows: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    long_prompts: str = "refuse",
    name: str = "train_dataset",
    options: Options | None = None,
) -> list[Prompt]:
    """Rows with `prompt` (text or messages), `messages`, or `input_ids`; an optional `prompt_id` names the row.

    `messages` that end with the assistant's turn are a prompt without it; a `prompt` that ends with one is continued.
    `chat_template_kwargs` and `tools` of a row go to the chat template, after options. A row with no prompt or without
    tokens is a UserError that names it; so is one over max_tokens, unless long_prompts says "drop", or "truncate" to
    its last tokens: reward functions get what these tokens say.
    """
    prompts: list[Prompt] = []
    seen: Counter[str] = Counter()
    for i, row in enumerate(rows):
        where = f"{name} row {i}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: expected columns with values, found {type(row).__name__}")
        own = {**(options or {}), **template_options(row, where)}
        content, ids = _read_row(row, tokenizer, where, own)
        if not ids or (max_tokens is not None and len(ids) > max_tokens):
            if ids and long_prompts == "drop":
                continue
            if not ids or max_tokens is None or long_prompts == "refuse":
                limit = "1 or more" if max_tokens is None else f"1 to {max_tokens}"
                raise UserError(f"{where}: expected {limit} tokens, found {len(ids)}")
            ids = ids[-max_tokens:]
            content = _last_of(content, tokenizer, ids)
        columns = {key: value for key, value in row.items() if key not in _OWN}
        prompt_id = str(row.get("prompt_id", i))
        stream = f"{prompt_id}\n{seen[prompt_id]}" if seen[prompt_id] else prompt_id
        prompts.append(Prompt(prompt_id, ids, content, columns, stream, own))
        seen[prompt_id] += 1
    if not prompts:
        raise UserError(f"{name}: expected at least 1 prompt, found none")
    return prompts


def _last_of(content: str | Messages, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str | Messages:
    """The part of a prompt that its last tokens say: of messages the last ones, the first of them from where it is."""
    text = str(tokenizer.decode(ids))
    if isinstance(content, str):
        return text
    said = decode_response(tokenizer, ids, strip=False).lstrip("\ufffd")  # a character may be cut
    kept: Messages = []
    for message in reversed(content):
        whole: Any = message.get("content")
        at = said.rfind(whole.strip()) if isinstance(whole, str) else len(said)
        if at < 0:
            ends = (whole[i:] for i in range(max(len(whole) - len(said), 1), len(whole) + 1))
            end = next(end for end in ends if said.startswith(end.rstrip()))
            return [{**message, "content": end}, *kept] if end.strip() or not kept else kept
        said = said[:at]
        kept.insert(0, message)
    return kept


def _read_row(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str, options: Options
) -> tuple[str | Messages, list[int]]:
    if "prompt" in row or "messages" in row:
        content = _checked_content(row["prompt"] if "prompt" in row else row["messages"], where)
        if "prompt" not in row and not isinstance(content, str) and content and content[-1]["role"] == "assistant":
            content = content[:-1]
        try:
            return content, encode_prompt(tokenizer, content, options) if content else []
        except UserError as error:  # for example, a template may require alternating turns
            raise UserError(f"{where}: {error}") from error
    if "input_ids" in row:
        ids = _checked_ids(row["input_ids"], tokenizer, where, row.get("attention_mask"))
        return str(tokenizer.decode(ids)), ids
    raise UserError(f"{where}: expected column 'prompt', 'messages' or 'input_ids', found {sorted(row)}")


def _checked_content(content: Any, where: str) -> str | Messages:
    if isinstance(content, str):
        return checked_text(content, where)
    if not isinstance(content, list) or not all(isinstance(m, Mapping) and "role" in m for m in content):
        raise UserError(f"{where}: expected text or messages with a role, found {type(content).__name__}")
    for message in content:
        if "content" not in message and "tool_calls" not in message:
            raise UserError(f"{where}: expected messages with content, found {sorted(message)}")
        if isinstance(message.get("content"), str):
            checked_text(message["content"], where)
    return content


def _checked_ids(ids: Any, tokenizer: PreTrainedTokenizerBase, where: str, mask: Any = None) -> list[int]:
    """mask: False where ids were padded beforehand; None for no padding."""
    try:
        found = [int(token) for token in ids]
    except (TypeError, ValueError):
        raise UserError(f"{where}: expected token ids in input_ids, found {type(ids).__name__} {ids!r:.40}") from None
    if mask is not None:
        found = [token for token, real in zip(found, mask, strict=True) if real]
    size = len(tokenizer)
    wrong = next((token for token in found if not 0 <= token < size), None)
    if wrong is not None:
        raise UserError(f"{where}: expected ids of the tokenizer's {size} tokens, found {wrong}")
    return found


def as_row(prompt: Any, prompt_id: str) -> dict[str, Any]:
    """A bare prompt (text, messages or token ids, as a list or a tensor) as a row with an id."""
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.tolist()
    if isinstance(prompt, dict):
        return {"prompt_id": prompt_id, **prompt}
    is_ids = isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)
    return {"prompt_id": prompt_id, "input_ids" if is_ids else "prompt": prompt}


def response_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: Any, index: int) -> list[int]:
    """A response (text, or token ids as a list or a tensor) as token ids; an empty one is a UserError."""
    if isinstance(response, str):
        text = checked_text(response, f"responses row {index}")
        return encode_response(tokenizer, prompt.content, text, prompt.options)
    ids = _checked_ids(response, tokenizer, f"responses row {index}")
    if not ids:
        raise UserError(f"responses row {index}: expected at least 1 token, found none")
    return ids


def batches(prompts: list[Prompt], size: int, seed: int, steps: int) -> Iterator[list[Prompt]]:
    """`steps` global batches: every prompt once per epoch, shuffled by (seed, epoch), with a last partial batch."""
    epoch = 0
    while True:
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        for start in range(0, len(order), size):
            if steps == 0:
                return
            steps -= 1
            yield [prompts[i] for i in order[start : start + size]]
        epoch += 1


def check_evaluation(args: PPOConfig, eval_dataset: Any) -> None:
    """A UserError if the arguments ask for evaluation and there is no eval_dataset."""
    asked = {"eval_strategy": args.eval_strategy != IntervalStrategy.NO, "eval_on_start": args.eval_on_start}
    for name, wanted in asked.items():
        if wanted and not eval_dataset:
            raise UserError(f"eval_dataset: {name} needs one, but none was passed")


def eos_ids(args: PPOConfig, model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where responses end: at stop_token_id, or at every EOS of model and tokenizer."""
    if args.stop_token_id is None:
        return stop_ids(unwrap_peft(model), tokenizer)
    return _checked_ids([args.stop_token_id], tokenizer, "stop_token_id")


def stops_at_text(args: PPOConfig, model: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether responses end at a token that belongs to their text: a stop_token_id such as that of a line's end."""
    stop = args.stop_token_id
    return (
        stop is not None
        and stop not in stop_ids(unwrap_peft(model), tokenizer)
        and bool(decode_response(tokenizer, [stop], strip=False))
    )


def check_ids(model: Any, rows: Iterable[Sequence[int]], name: str) -> None:
    """A UserError for a token that the model has no embedding for: a tokenizer may have been given more."""
    size = unwrap_peft(model).config.get_text_config(decoder=True).vocab_size
    worst = max((max(ids, default=0) for ids in rows), default=0)
    if worst >= size:
        raise UserError(
            f"{name}: expected token ids below {size}, the number of the model's embeddings, found {worst}; "
            "resize_token_embeddings(len(tokenizer)) makes room for tokens that were added"
        )


def check_positions(args: PPOConfig, positions: int | None, longest: int, name: str, role: str = "model") -> None:
    """A UserError if the longest prompt and its response have more tokens than the role has positions."""
    if positions is not None and longest + args.response_length > positions:
        raise UserError(
            f"{name}: expected prompts of at most {positions - args.response_length} tokens, so that "
            f"response_length={args.response_length} more fit the {role}'s {positions} positions, found one of "
            f"{longest}; see max_prompt_tokens and long_prompts"
        )
