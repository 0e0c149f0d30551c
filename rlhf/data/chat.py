"""Conversations to tokens and back, the same way in reward training, PPO and evaluation.

A sequence is the tokens of the rendered prompt, then those of the response, then one EOS. Prompt and response are
tokenised separately, because a policy continues given tokens.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.time_limit import time_limit
from rlhf.errors import UserError

Messages = list[dict[str, str]]

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


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Prepare a policy's tokenizer, in place: add our chat template and a pad token (EOS) if missing; pad on the left.

    EOS as the pad token is safe because every mask comes from lengths. Returns the tokenizer.
    """
    if tokenizer.eos_token is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r}: expected an EOS token, found none")
    if not tokenizer.chat_template:
        tokenizer.chat_template = HH_TEMPLATE
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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt up to where the response starts. Text is used unchanged, messages are rendered."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer(render(tokenizer, prompt, add_generation_prompt=True), add_special_tokens=False)["input_ids"]


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, response: str) -> list[int]:
    """Token ids of a complete response as the template writes it after the prompt, with one EOS at the end."""
    text = response
    if not isinstance(prompt, str):
        start = render(tokenizer, prompt, add_generation_prompt=True)
        whole = render(tokenizer, [*prompt, {"role": "assistant", "content": response}])
        # Templates that rewrite the history (reasoning models) have no common start: use the bare text.
        if whole.startswith(start) and response.strip() in whole[len(start) :]:
            text = whole[len(start) :]
    # Drop what a template writes after EOS (SmolLM2: a newline): a policy never samples it.
    text = text.split(tokenizer.eos_token)[0]
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Response ids -> text without special tokens and outer white space."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def prompt_text(prompt: str | Messages) -> str:
    """A prompt for human readers: a single user turn as its bare text, a dialogue with roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> str:
    """Render messages with the chat template; a UserError if it fails or takes longer than TEMPLATE_SECONDS."""
    try:
        with time_limit(TEMPLATE_SECONDS):
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is the model's program: it may raise anything
        name = tokenizer.name_or_path
        raise UserError(f"tokenizer {name!r}: its chat template failed on the messages: {error}") from error
