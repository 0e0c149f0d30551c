"""Conversations to tokens and back, the same way in reward training, PPO and evaluation.

A sequence is the tokens of the rendered prompt, then those of the response, then one token that ends it (`end_id`).
Prompt and response are tokenised separately, because a policy continues given tokens. What the template writes may
become control tokens; what people wrote, in messages and in responses, never does.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.time_limit import time_limit
from rlhf.errors import UserError

Messages = list[dict[str, Any]]
Options = Mapping[str, Any]  # arguments of a chat template, `tools` among them

TEMPLATE_SECONDS = 10  # limit for rendering; usual templates take less than a millisecond

# For models without a chat template: the style of the HH-RLHF data.
HH_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ '\n\nHuman: ' + message['content'] }}
{%- elif message['role'] == 'assistant' -%}{{ '\n\nAssistant: ' + message['content'] }}
{%- if loop.last -%}{{ eos_token }}{%- endif -%}
{%- else -%}{{ message['content'] }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\n\nAssistant:' }}{%- endif -%}"""

# The date in templates that print today's: prompts are the same tokens on every day of a run, and in every stage.
TODAY = datetime(2024, 7, 26)
_CODES = ("-d", "-m", "-I", *"aAbBcdeHIjmMpSuwxXyY")
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f"|replace('%{code}', '{TODAY.strftime(f'%{code}')}')" for code in _CODES)
    + " -}}{%- endmacro -%}"
)
_MARK = "\ue000"  # stands for a response while the template is asked what it writes around one


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Prepare a policy's tokenizer, in place: add our chat template and a pad token (EOS) if missing; pad on the left.

    Our template begins with BOS if the tokenizer begins texts with it. EOS as the pad token is safe because every mask
    comes from lengths. Returns the tokenizer.
    """
    if tokenizer.eos_token is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r}: expected an EOS token, found none")
    if not tokenizer.chat_template:
        has_bos = _beginning(tokenizer) == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{- bos_token -}}\n" if has_bos else "") + HH_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def give_distinct_pad(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Make the pad token differ from EOS, for reward models; True if the vocabulary grew by one.

    transformers' classification models read the score at the last token that is not the pad: with pad = EOS
    they would miss the EOS that ends a response. The unknown token is used if it is a separate token (byte-level
    vocabularies never produce it); otherwise `<|pad|>` is added.
    """
    taken = {None, tokenizer.eos_token, tokenizer.bos_token}
    if tokenizer.pad_token not in taken:
        return False
    if tokenizer.unk_token not in taken:
        tokenizer.pad_token = tokenizer.unk_token
        return False
    return tokenizer.add_special_tokens({"pad_token": "<|pad|>"}) > 0


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, options: Options | None = None
) -> list[int]:
    """Token ids of a prompt up to where the response starts. Messages are rendered, a last assistant turn is continued.

    Text is used unchanged, control tokens in it included; BOS is in front if the tokenizer begins texts with it.
    options: of the chat template.
    """
    if isinstance(prompt, str):
        return _encode_text(tokenizer, prompt)
    return encode_dialogue(tokenizer, prompt, options, **_opening(prompt))


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, options: Options | None = None, **how: Any
) -> list[int]:
    """Token ids of rendered messages; how: of `apply_chat_template`."""
    if _control_tokens(tokenizer, len(tokenizer)).search(f"{messages}{options}"):  # somebody quotes one
        how |= {"tokenize": True, "return_dict": False, "sanitize_control_tokens": True}
        return list(_apply(tokenizer, messages, options, **how))
    return _written(tokenizer, render(tokenizer, messages, options, **how))


def encode_response(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, response: str, options: Options | None = None
) -> list[int]:
    """Token ids of a finished response: its text, as the template writes it after the prompt, then `end_id`."""
    return encode_responses(tokenizer, prompt, [response], options)[0]


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, responses: Sequence[str], options: Options | None = None
) -> list[list[int]]:
    """As `encode_response`, of several responses to one prompt, which is rendered once."""
    end = end_id(tokenizer)
    ending = str(tokenizer.convert_ids_to_tokens(end))
    if isinstance(prompt, str):  # rendered by whoever wrote it: it may come with its end, which is not doubled
        texts = [response.removesuffix(ending).removesuffix(tokenizer.eos_token) for response in responses]
        frames = [(prompt, "", text, "") for text in texts]
    else:
        frames = _frames(tokenizer, prompt, responses, options)
    found = []
    for start, before, text, after in frames:
        # What a template writes behind the end (a newline), a policy never samples.
        behind, ends, _ = after.partition(ending)
        text += behind if ends or behind.strip() else ""
        control = _written(tokenizer, before) if before else []
        is_plain = not before or control == _as_text(tokenizer, before)
        ids = _rest(tokenizer, start, before + text) if is_plain else control + _as_text(tokenizer, text)
        found.append([*ids, end])
    return found


def _rest(tokenizer: PreTrainedTokenizerBase, start: str, text: str) -> list[int]:
    """Ids of a text that goes on behind start, which has its own ids, as the tokenizer reads the two together.

    SentencePiece's begin every text with a blank, which a policy does not sample there.
    """
    alone = _as_text(tokenizer, text)
    if not _begins_with_blank(tokenizer, len(tokenizer)):
        return alone
    quotes = _control_tokens(tokenizer, len(tokenizer)).search(text)
    start, encode = ("\n", _as_text) if quotes else (start, _written)
    known, whole = encode(tokenizer, start), encode(tokenizer, start + text)
    return whole[len(known) :] if whole[: len(known)] == known else alone


@lru_cache(maxsize=32)
def _begins_with_blank(tokenizer: PreTrainedTokenizerBase, size: int) -> bool:
    """Whether the tokenizer puts SentencePiece's blank in front of a text; size: of the vocabulary."""
    first = tokenizer.convert_ids_to_tokens(_as_text(tokenizer, "x"))[:1]
    return "".join(map(str, first)).startswith("\u2581")


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a finished response, whichever one a policy sampled: in training rows and in what is scored.

    The first control token that the chat template writes behind an answer (Gemma: `<end_of_turn>`), else EOS.
    """
    return _end_id(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token)


@lru_cache(maxsize=32)
def _end_id(tokenizer: PreTrainedTokenizerBase, template: str, eos: str) -> int:
    try:
        ((*_, after),) = _frames(tokenizer, [{"role": "user", "content": "x"}], ["x"], None)
    except UserError:  # it refuses this conversation, or has no template
        after = ""
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    ends = {number for number, text in added.items() if not text.isspace()} | {tokenizer.eos_token_id}
    found: int = next((i for i in _written(tokenizer, after) if i in ends), tokenizer.eos_token_id)
    return found


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], strip: bool = True) -> str:
    """Response ids -> text without control tokens and, unless told otherwise, outer white space.

    Special tokens that frame no turn, such as tags that a reward looks for, are text.
    """
    control = _frame_ids(tokenizer, str(tokenizer.chat_template), len(tokenizer))
    text = str(tokenizer.decode([i for i in ids if i not in control], skip_special_tokens=False))
    return text.strip() if strip else text


def decode_rest(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """As `decode_response`, of a text that goes on: with its first blank, which SentencePiece's decoders drop."""
    return decode_response(tokenizer, [*_as_text(tokenizer, "x"), *ids], strip=False).removeprefix("x")


@lru_cache(maxsize=32)
def _frame_ids(tokenizer: PreTrainedTokenizerBase, template: str, size: int) -> set[int]:
    """The special tokens that have a role (EOS, pad, ...) or that the template writes between turns."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    turns = [{"role": role, "content": _MARK} for role in ("user", "assistant", "user")]
    try:
        between = render(tokenizer, turns, add_generation_prompt=True).split(_MARK)[1:]
    except UserError:  # it refuses this conversation, or there is none
        return special
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    named = {getattr(tokenizer, f"{name}_id") for name in names}
    return special & {*named, *_written(tokenizer, "".join(between))}


def continues(prompt: str | Messages) -> bool:
    """Whether a response goes on with the prompt's last text: white space between the two counts."""
    return isinstance(prompt, str) or prompt[-1]["role"] == "assistant"


def prompt_text(prompt: str | Messages) -> str:
    """A prompt for human readers: a single user turn as its bare text, a dialogue with roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def answered(prompt: Messages, response: str) -> Messages:
    """The conversation with its response: a turn of its own, or the rest of the assistant's turn that it continues."""
    if not continues(prompt):
        return [*prompt, {"role": "assistant", "content": response}]
    begun = prompt[-1]["content"]
    rest: Any = response if isinstance(begun, str) else [{"type": "text", "text": response}]
    return [*prompt[:-1], {**prompt[-1], "content": begun + rest}]


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, options: Options | None = None, **how: Any) -> str:
    """Render messages with the chat template; a UserError if it fails or takes longer than TEMPLATE_SECONDS."""
    return str(_apply(tokenizer, messages, options, tokenize=False, **how))


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, options: Options | None, **how: Any) -> Any:
    given = {**(options or {}), **how}
    try:
        template = tokenizer.get_chat_template(given.pop("chat_template", None), given.get("tools"))
        if "strftime_now" in template:
            template = _FIXED_DATE + template
        with time_limit(TEMPLATE_SECONDS):
            return tokenizer.apply_chat_template(messages, chat_template=template, **given)
    except Exception as error:  # a template is the model's program: it may raise anything
        name = tokenizer.name_or_path
        raise UserError(f"tokenizer {name!r}: its chat template failed on the messages: {error}") from error


def _opening(prompt: Messages) -> dict[str, bool]:
    return {"continue_final_message": True} if continues(prompt) else {"add_generation_prompt": True}


def _frames(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, responses: Sequence[str], options: Options | None
) -> list[tuple[str, str, str, str]]:
    """Of each response: the rendered prompt, what the template writes before the response, the response as it writes
    it, what is behind."""
    start = render(tokenizer, prompt, options, **_opening(prompt))
    around = render(tokenizer, answered(prompt, _MARK), options)
    before, _, after = around.removeprefix(start).partition(_MARK)
    found = []
    for response in responses:
        whole = render(tokenizer, answered(prompt, response), options)
        text = whole[len(start) + len(before) : len(whole) - len(after)]
        if whole == start + before + text + after and text.strip() == response.strip():
            found.append((start, before, text, after))
        else:  # a template that rewrites the history or the response (reasoning models)
            found.append((start, "", response, ""))
    return found


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that is continued: without the EOS that some tokenizers append, and with one BOS."""
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return [*([] if has_bos else _beginning(tokenizer)), *_written(tokenizer, text)]


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    bare, whole = _written(tokenizer, "x"), list(tokenizer("x")["input_ids"])
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:start]


@lru_cache(maxsize=32)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    """Matches the special tokens; size: of the vocabulary, which may grow."""
    texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _written(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text in which control tokens are control tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    return ids


def _as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text in which control tokens are text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids
