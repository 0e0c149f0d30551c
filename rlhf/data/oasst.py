"""Prompts from OpenAssistant conversations (Köpf et al. 2023, arXiv:2304.07327), each a single turn, and other rows.

Rows are recognised by their shape, so one file may hold several kinds: a message (flat rows, as on the hub), a
conversation tree (OpenAssistant's export), plain text, which is one prompt, and the layouts of layouts.py. Every
prompter's message is a prompt, at any depth. Each message is counted once: as kept, or under the first rule below that
drops it, so that messages = kept + the drops. It is also counted as `layout_NAME`.

1. assistant: its role is not prompter;
2. deleted: it is marked as deleted;
3. other_language: it is in another language (a row without a language, like plain text, is kept);
4. empty: nothing is left after stripping;
5. duplicate: its text (ignoring white space and case) or its id occurred earlier, in this or an earlier source.
"""

import hashlib
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data.chat import prompt_text
from rlhf.data.layouts import Turn, other_columns, prompt_turns, renamed, template_options, unknown_prompt
from rlhf.data.sources import (
    DATA_SUFFIXES,
    checked_text,
    fetch,
    fetch_data,
    is_hub_id,
    kind,
    local_path,
    one_line,
    read_rows,
    reasons,
    text_field,
)
from rlhf.data.splits import require_sizes, split_by_group, text_key
from rlhf.errors import UserError

HUB_ID = "OpenAssistant/oasst1"

_DROPS = ("assistant", "deleted", "other_language", "empty", "duplicate")
_ROLES = ("prompter", "assistant")


@dataclass(frozen=True)
class TextPrompt:
    """One prompter's message, stripped, or a conversation that waits for an answer."""

    prompt_id: str  # the message's id; of other rows the first 16 hex digits of their text's SHA-1
    tree_id: str  # the conversation's id; of other rows made from their first user turn as prompt_id from the text
    text: str  # as a person reads it
    turns: list[Turn] | None = None  # of a conversation; None: the text is its only turn
    columns: dict[str, Any] = field(default_factory=dict, compare=False)  # its row's other fields, for reward functions
    options: dict[str, Any] = field(default_factory=dict, compare=False)  # its row's, of the chat template

    @property
    def messages(self) -> list[Turn]:
        """What the chat template renders."""
        return self.turns or [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class PromptSplit:
    """Prompts for PPO, evaluation and human rating; no two splits share a conversation tree."""

    train: list[TextPrompt]
    evaluation: list[TextPrompt]
    rating: list[TextPrompt]


@dataclass(frozen=True)
class _Message:
    prompt: TextPrompt
    role: str
    lang: str | None  # None: unknown
    deleted: bool
    layout: str


def load_prompts(
    sources: Sequence[str],
    lang: str | None = "en",
    revision: str | None = None,
    data_dir: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[TextPrompt], dict[str, int]]:
    """Return the prompts of all sources, in file order, and counts: messages, this module's rules, kept, layouts.

    sources: each a hub id such as OpenAssistant/oasst1, a file (.jsonl, .json, .txt, .csv, each also .gz, .parquet or
    .arrow) or a folder of them. lang: an ISO 639-1 code, None for all languages. revision: a branch, tag or commit of
    the hub data sets. data_dir: a folder inside the sources that are no files, or a pattern of their files. columns:
    field -> the column's name in the rows. Raises UserError for a missing source, where none has a prompt and, naming
    file, line and field, for a row of another shape.
    """
    counts = dict.fromkeys(["messages", *_DROPS, "kept"], 0)
    prompts: list[TextPrompt] = []
    layouts: Counter[str] = Counter()
    seen: set[str] = set()
    for message in _messages(fetch_prompts(sources, revision, data_dir), columns or {}):
        prompt = message.prompt
        layouts[f"layout_{message.layout}"] += 1
        # The newline keeps ids and texts apart: no folded text contains one.
        marks = {text_key(prompt.text), f"\n{prompt.prompt_id}"}
        reason = _drop_reason(message, lang, bool(marks & seen))
        counts["messages"] += 1
        counts[reason or "kept"] += 1
        if reason is None:
            seen |= marks
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"{', '.join(sources)}: expected prompts, found {reasons(counts, 'message', _DROPS)}")
    return prompts, counts | layouts


def drop_long(
    prompts: Iterable[TextPrompt], length: Callable[[TextPrompt], int], limit: int
) -> tuple[list[TextPrompt], int]:
    """Return the prompts with length(prompt) <= limit, for example in tokens, and the number of prompts dropped."""
    everything = list(prompts)
    kept = [prompt for prompt in everything if length(prompt) <= limit]
    return kept, len(everything) - len(kept)


def split_prompts(prompts: Sequence[TextPrompt], seed: int, n_train: int, n_eval: int, n_rating: int) -> PromptSplit:
    """Split by conversation tree. Deterministic by seed, whatever the order of prompts.

    Rating and evaluation are filled first, with one random prompt per tree, so that they cover as many
    conversations as possible. Train gets up to n_train of the other trees' prompts and may come out
    shorter. Raises UserError if rating or evaluation cannot be filled or train is empty.
    """
    trees: dict[str, list[TextPrompt]] = defaultdict(list)
    for prompt in sorted(prompts, key=lambda prompt: (prompt.tree_id, prompt.prompt_id)):
        trees[prompt.tree_id].append(prompt)
    random_ = random.Random(seed)
    singles = [random_.choice(tree) for tree in trees.values()]
    sizes = {"rating": n_rating, "evaluation": n_eval}
    held_out = split_by_group(singles, lambda prompt: prompt.tree_id, seed, sizes)
    used = {prompt.tree_id for split in held_out.values() for prompt in split}
    rest = [prompt for prompt in prompts if prompt.tree_id not in used]
    train = split_by_group(rest, lambda prompt: prompt.tree_id, seed, {"train": n_train})
    require_sizes({**held_out, **train}, {**sizes, "train": n_train}, f"prompts ({len(trees)} trees)")
    return PromptSplit(train["train"], held_out["evaluation"], held_out["rating"])


def _drop_reason(message: _Message, lang: str | None, seen: bool) -> str | None:
    holds = {
        "assistant": message.role != "prompter",
        "deleted": message.deleted,
        "other_language": lang is not None and message.lang not in (None, lang),
        "empty": not message.prompt.text,
        "duplicate": seen,
    }
    return next((reason for reason in _DROPS if holds[reason]), None)


def _messages(paths: Iterable[Path], columns: Mapping[str, str]) -> Iterator[_Message]:
    for path in paths:
        for number, row in read_rows(path):
            where = f"{path}:{number}"
            yield from _row_messages(renamed(row, columns, where), where)


def fetch_prompts(sources: Sequence[str], revision: str | None, data_dir: str | None = None) -> list[Path]:
    """Fetch the files that `load_prompts` reads and return their paths; a UserError if a source has none."""
    return [path for source in sources for path in _files(source, revision, data_dir)]


def _files(source: str, revision: str | None, data_dir: str | None) -> list[Path]:
    in_hub_layout = is_hub_id(source) and source.startswith("OpenAssistant/")
    in_hub_layout |= os.path.isdir(local_path(source)) and any(local_path(source).glob("data/*.parquet"))
    # The hub's repository holds the same messages again, as trees: the parquet files are enough.
    if in_hub_layout and data_dir is None:
        return fetch(source, ["data/*.parquet"], revision)
    if not is_hub_id(source) and not os.path.isdir(local_path(source)):
        data_dir = None
    return fetch_data(source, [f"*{suffix}" for suffix in DATA_SUFFIXES], data_dir, revision, "prompt_dir")


def _row_messages(row: Any, where: str) -> Iterator[_Message]:
    if isinstance(row, str):
        text = checked_text(row, where).strip()
        yield _Message(TextPrompt(_digest(text), _digest(text), text), "prompter", None, False, "text")
    elif isinstance(row, dict) and isinstance(row.get("prompt"), dict):
        yield from _tree_messages(row["prompt"], text_field(row, "message_tree_id", where), where)
    elif isinstance(row, dict) and "role" in row:
        yield _message(row, text_field(row, "message_tree_id", where), where, "oasst_message")
    elif found := prompt_turns(row, where):
        yield _conversation(*found, row, template_options(row, where))
    else:
        raise unknown_prompt(row, where)


def _conversation(layout: str, turns: list[Turn], row: dict[str, Any], options: dict[str, Any]) -> _Message:
    """The prompt that a row's turns are; empty with no user's turn or an empty one."""
    opening = next((turn["content"] for turn in turns if turn["role"] == "user"), "")
    text = prompt_text(turns) if opening and all(turn["content"] for turn in turns) else ""
    single = len(turns) == 1 and turns[0]["role"] == "user"
    prompt = TextPrompt(_digest(text), _digest(opening), text, None if single else turns, other_columns(row), options)
    lang = row.get("lang")
    return _Message(prompt, "prompter", lang if isinstance(lang, str) else None, False, layout)


def _digest(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:16]


def _tree_messages(root: dict[str, Any], tree_id: str, where: str) -> Iterator[_Message]:
    """Yield a tree's messages, parents before their replies; not recursive, since trees may be deep."""
    stack: list[Any] = [root]
    while stack:
        node = stack.pop()
        if not isinstance(node, dict):
            raise UserError(f"{where}: field 'replies': expected a list of objects, found {kind(node)} in it")
        yield _message(node, tree_id, where, "oasst_tree")
        replies = node.get("replies")
        if not isinstance(replies, list | None):
            raise UserError(f"{where}: field 'replies': expected a list, found {kind(replies)}")
        stack += reversed(replies or [])


def _message(row: dict[str, Any], tree_id: str, where: str, layout: str) -> _Message:
    role = text_field(row, "role", where)
    if role not in _ROLES:
        raise UserError(f"{where}: field 'role': expected 'prompter' or 'assistant', found '{one_line(role)}'")
    deleted = row.get("deleted")
    if not isinstance(deleted, bool | None):
        raise UserError(f"{where}: field 'deleted': expected true or false, found {kind(deleted)}")
    lang = None if row.get("lang") is None else text_field(row, "lang", where)
    prompt = TextPrompt(text_field(row, "message_id", where), tree_id, text_field(row, "text", where).strip())
    return _Message(prompt, role, lang, bool(deleted), layout)
