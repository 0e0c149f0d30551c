"""Layouts in which people keep preference pairs and prompts: a row is recognised, named and turned into messages.

A side of a pair is a whole conversation that ends in the response, or the response alone beside a prompt. Text in
which "Human:" and "Assistant:" begin after an empty line is a conversation. Messages have role and content, or from and
value as in ShareGPT. An empty system turn is none.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.data import preferences
from rlhf.data.sources import checked_text, kind, one_line, text_field
from rlhf.errors import UserError, did_you_mean

Turn = dict[str, str]  # role ("system", "user" or "assistant") and content, stripped

_OF_A_ROW = ("prompt", "chosen", "rejected", "messages", "conversations", "system", "instruction", "input", "history")
FIELDS = (*_OF_A_ROW, *preferences.FIELDS)
_QUESTIONS = ("question", "query")  # other names of a prompt's text
_CONVERSATIONS = ("messages", "conversations")
OPTIONS = ("chat_template_kwargs", "tools")  # for the chat template
_USED = {*_OF_A_ROW, *_QUESTIONS, *OPTIONS}

_TURN = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):|\A\s*(System):")
_ASKED = re.compile(r"\r?\n\r?\nAssistant:\s*\Z")
_ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
}
_PAIRS = (
    "text with Human: and Assistant: turns, messages, or a response beside 'prompt', 'question', 'query', "
    "'instruction', 'messages' or 'conversations'; or give two, as 'response_0', 'response_1' and 'better_response_id'"
)


class Side(NamedTuple):
    """One side of a pair: its last turn is the response."""

    before: str  # text in front of the first turn
    turns: list[Turn]

    @property
    def prompt(self) -> list[Turn]:
        """The turns before the response."""
        return self.turns[:-1]

    @property
    def response(self) -> str:
        """The last turn's text."""
        return self.turns[-1]["content"]


def opens(turns: Sequence[Turn]) -> str | None:
    """Who speaks first, the system turn aside; None if nobody does."""
    return next((turn["role"] for turn in turns if turn["role"] != "system"), None)


def parse_columns(name: str, given: Sequence[str]) -> dict[str, str]:
    """The setting `name`, a list of FIELD=COLUMN, as field -> column."""
    found = {}
    for one in given:
        field, equals, column = str(one).partition("=")
        if not equals or not column or field not in FIELDS:
            meant = did_you_mean(field, FIELDS)
            raise UserError(f"{name}: expected FIELD=COLUMN with a field of {', '.join(FIELDS)}, found {one!r}{meant}")
        found[field] = column
    return found


def renamed(row: Any, columns: Mapping[str, str], where: str) -> Any:
    """The row with its columns under the names of the fields that they are."""
    if not columns or not isinstance(row, dict):
        return row
    for column in columns.values():
        if column not in row:
            raise UserError(f"{where}: expected a column '{column}', found {_names(row)}")
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return rest | {field: row[column] for field, column in columns.items()}


def pair_sides(row: Any, where: str) -> tuple[str, Side, Side]:
    """The name of a pair's layout, and its sides; a UserError, with the layouts, for a row that is no pair.

    Where neither response is better, one side is both.
    """
    both = preferences.compared(row, where) if isinstance(row, dict) else None
    if both:
        row = row | {"chosen": both.better, "rejected": both.worse}
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        raise unknown_pair(row, where)
    layout, prompt = _prompt(row, where)
    sides = [_side(row, name, prompt, where) for name in ("chosen", "rejected")]
    if not layout or _is_dialogue(row["chosen"]):
        layout = "hh_text" if isinstance(row["chosen"], str) else _name(row["chosen"], "implicit_prompt")
    if both:
        return "two_responses", sides[0], sides[0] if both.is_tie else sides[1]
    return layout, sides[0], sides[1]


def prompt_turns(row: Any, where: str) -> tuple[str, list[Turn]] | None:
    """The name of a prompt's layout, and its turns; None if the row is in no layout of this module.

    Turns of 'messages' and 'conversations' that end in the assistant's are a prompt without it, as is a pair.
    """
    if not isinstance(row, dict):
        return None
    if {"chosen", "rejected"} <= row.keys():
        return _prompt_of_pair(row, where)
    layout, turns = _prompt(row, where)
    if layout:
        return layout, turns
    for name in _CONVERSATIONS:
        if row.get(name) is not None:
            turns = _system(row, where) + _messages(row[name], f"{where}: field '{name}'")
            answered = bool(turns) and turns[-1]["role"] == "assistant"
            return _name(row[name], "messages"), turns[:-1] if answered else turns
    return _prompt_of_pair(row, where) if preferences.compared(row, where) else None


def _prompt_of_pair(row: Any, where: str) -> tuple[str, list[Turn]]:
    layout, chosen, _ = pair_sides(row, where)
    whole = not chosen.before and chosen.turns and chosen.turns[-1]["role"] == "assistant"
    return layout, chosen.prompt if whole else []


def template_options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row's `chat_template_kwargs`, and its `tools`: a list of JSON schemas, or that as a text, as in TRL."""
    found, tools = row.get("chat_template_kwargs"), row.get("tools")
    if not isinstance(found, Mapping | None):
        raise UserError(f"{where}: expected a mapping in chat_template_kwargs, found {type(found).__name__}")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:
        raise UserError(f"{where}: expected tools as JSON, found {tools!r:.40}") from None
    if not isinstance(tools, list | None):
        raise UserError(f"{where}: expected a list of JSON schemas in tools, found {type(tools).__name__}")
    # A data set fills mappings with None for what other rows have.
    given = {key: value for key, value in (found or {}).items() if value is not None}
    return given | ({"tools": tools} if tools else {})


def other_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row has beside its prompt: for reward functions."""
    return {name: value for name, value in row.items() if name not in _USED and name != "prompt_id"}


def unknown_pair(row: Any, where: str) -> UserError:
    """The error for a row that is in no layout of a pair."""
    return UserError(
        f"{where}: expected an object with fields 'chosen' and 'rejected', found {_shown(row)}; each is {_PAIRS}; "
        "columns of other names: dataset_columns"
    )


def unknown_prompt(row: Any, where: str) -> UserError:
    """The error for a row that is in no layout of a prompt."""
    return UserError(
        f"{where}: expected a message (message_id, message_tree_id, role, text), a tree (message_tree_id, and in field "
        "'prompt' an object), an object with 'prompt' (text or messages), 'messages', 'conversations', 'instruction', "
        f"'question', 'query', or 'chosen' and 'rejected', or one text, found {_shown(row)}; columns of other names: "
        "prompt_columns"
    )


def parse_dialogue(text: str) -> tuple[str, list[Turn]]:
    """Return (text before the first turn, turns with stripped content) of a dialogue in the format of HH-RLHF.

    A speaker's mark counts only at the start of the text or after an empty line; elsewhere it is part of a turn.
    A system turn can only be the first.
    """
    before, *rest = _TURN.split(text)
    marks = [first or second for first, second in zip(rest[::3], rest[1::3], strict=True)]
    turns = [
        {"role": _ROLES[who.lower()], "content": said.strip()} for who, said in zip(marks, rest[2::3], strict=True)
    ]
    return before.strip(), turns


def _prompt(row: dict[str, Any], where: str) -> tuple[str, list[Turn]]:
    """The layout and turns of a prompt that stands apart from the response; ("", []) if the row has none."""
    if row.get("prompt") is not None:
        value, where = row["prompt"], f"{where}: field 'prompt'"
        system = _system(row, where)
        if isinstance(value, str):
            return "prompt_text", system + _text_turns(checked_text(value, where))
        return _name(value, "prompt"), system + _messages(value, where)
    if row.get("instruction") is not None:
        parts = [text_field(row, name, where).strip() for name in ("instruction", "input") if row.get(name) is not None]
        if len(parts) == 1 and isinstance(row.get("context"), str):  # Dolly's name
            parts.append(row["context"].strip())
        asked = {"role": "user", "content": "\n".join(part for part in parts if part)}
        return "instruction", [*_system(row, where), *_history(row, where), asked]
    for name in (*_QUESTIONS, "input"):
        if row.get(name) is not None:
            return "prompt_text", _system(row, where) + _text_turns(text_field(row, name, where))
    for name in _CONVERSATIONS if "chosen" in row else ():
        if row.get(name) is not None:
            turns = _messages(row[name], f"{where}: field '{name}'")
            if turns and turns[-1]["role"] != "assistant":  # else a whole conversation, as the sides are
                return _name(row[name], "prompt"), _system(row, where) + turns
    return "", []


def _text_turns(text: str) -> list[Turn]:
    """The turns of a prompt's text: a dialogue that waits for the assistant, or one user turn."""
    if _TURN.match(text) and _ASKED.search(text):
        return parse_dialogue(_ASKED.sub("", text))[1]
    return [{"role": "user", "content": text.strip()}]


def _side(row: dict[str, Any], name: str, prompt: list[Turn], where: str) -> Side:
    value, place = row[name], f"{where}: field '{name}'"
    if isinstance(value, str):
        text = checked_text(value, place)
        if _is_dialogue(text) or not prompt:
            return Side(*parse_dialogue(text))
        return Side("", [*prompt, {"role": "assistant", "content": text.strip()}])
    if not isinstance(value, list | dict):
        raise UserError(f"{place}: expected text or messages, found {kind(value)}")
    turns = _messages(value, place)
    system = (prompt or _system(row, where))[:1]
    if not prompt or (opens(turns) == "user" and prompt[-1]["role"] == "user"):  # a whole conversation
        users = [turn["content"] for turn in turns if turn["role"] == "user"]
        if any(turn["role"] == "user" and turn["content"] not in users for turn in prompt):
            raise UserError(f"{place}: expected a response to field 'prompt', or a conversation with it, found another")
        has_system = bool(turns) and turns[0]["role"] == "system"
        return Side("", turns if has_system or not system or system[0]["role"] != "system" else system + turns)
    return Side("", prompt + turns)


def _is_dialogue(value: Any) -> bool:
    found = _TURN.match(value) if isinstance(value, str) else None
    return found is not None and (found[1] or found[2]) != "Assistant"


def _system(row: dict[str, Any], where: str) -> list[Turn]:
    text = text_field(row, "system", where).strip() if row.get("system") is not None else ""
    return [{"role": "system", "content": text}] if text else []


def _history(row: dict[str, Any], where: str) -> list[Turn]:
    """The earlier turns of an instruction: pairs of a question and its answer."""
    earlier = row.get("history") or []
    fine = isinstance(earlier, list) and all(isinstance(one, list) and len(one) == 2 for one in earlier)
    if not fine or not all(isinstance(text, str) for one in earlier for text in one):
        raise UserError(f"{where}: field 'history': expected a list of [question, answer], found {_shown(earlier)}")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": checked_text(text, f"{where}: field 'history'").strip()}
        for one in earlier
        for role, text in zip(roles, one, strict=True)
    ]


def _messages(value: Any, where: str) -> list[Turn]:
    """Messages, or a single one, as turns; an empty system turn is left out."""
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise UserError(f"{where}: expected text or messages, found {kind(value)}")
    turns = [_turn(message, f"{where}: turn {number}") for number, message in enumerate(messages, start=1)]
    return [turn for turn in turns if turn["content"] or turn["role"] != "system"]


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise UserError(f"{where}: expected an object with role and content, found {kind(message)}")
    who, said = ("from", "value") if "from" in message else ("role", "content")
    role = text_field(message, who, where)
    if role.lower() not in _ROLES:
        raise UserError(f"{where}: field '{who}': expected system, user or assistant, found '{one_line(role)}'")
    content = message.get(said)
    if isinstance(content, list):  # parts
        content = "".join(_part(part, where) for part in content)
    text = text_field({said: content} if said in message else {}, said, where)
    return {"role": _ROLES[role.lower()], "content": text.strip()}


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise UserError(f"{where}: field 'content': expected parts of type text, found {_shown(part)}")
    return text_field(part, "text", where)


def _name(value: Any, prefix: str) -> str:
    """The layout of messages: ShareGPT's names, or those of transformers."""
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict) and "from" in first:
        return "sharegpt"
    return prefix if prefix == "messages" else f"{prefix}_messages"


def _names(row: dict[str, Any]) -> str:
    return one_line(", ".join(map(repr, row)), 100) or "(none)"


def _shown(row: Any) -> str:
    """What a row is, for an error: an object's fields and how it begins."""
    if not isinstance(row, dict):
        return kind(row)
    return f"an object with fields {_names(row)}: {one_line(json.dumps(row, default=str, ensure_ascii=False), 120)}"
