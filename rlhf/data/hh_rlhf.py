"""Preference pairs, of Anthropic's HH-RLHF (Bai et al. 2022, arXiv:2204.05862) and in other layouts.

A row holds two dialogues, `chosen` and `rejected`, in one of the layouts of layouts.py, or two responses and which of
them is better, see preferences.py; the last assistant turn is
the response, everything before it the prompt. Some published rows break that form. Each row is counted once: as kept,
or under the first rule below that drops it, so that rows = kept + the drops. It is also counted as `layout_NAME`.

1. no_preference: of two responses neither is said to be better;
2. no_final_assistant: a side has no turn, or does not end in an assistant turn;
3. text_before_first_turn: a side has text before its first turn;
4. starts_with_assistant: a side opens with an assistant turn, or has no user's turn;
5. empty_response: a side's response is empty after stripping;
6. prompts_differ: the turns before the response are not the same on both sides;
7. prompt_ends_with_assistant: the response follows another assistant turn, not a user's;
8. empty_turn: a turn of the prompt is empty after stripping;
9. identical_responses: both responses are equal.

`merged_turns` counts, among the kept, prompts in which two turns in a row by one speaker were joined by a
newline.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data.layouts import Side, Turn, opens, pair_sides, renamed, template_options, unknown_pair
from rlhf.data.sources import DATA_SUFFIXES, fetch, fetch_data, is_hub_id, local_path, read_rows, reasons
from rlhf.data.splits import require_sizes, split_by_group, text_key
from rlhf.errors import UserError

HUB_ID = "Anthropic/hh-rlhf"
SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")

_RED_TEAM = "red-team-attempts"  # in the same repository, but single transcripts: no pairs
_PATTERNS = tuple(f"*{suffix}" for suffix in DATA_SUFFIXES if ".txt" not in suffix)


@dataclass(frozen=True)
class Pair:
    """A prompt with the better and the worse response, all text stripped."""

    prompt: list[Turn]  # a system turn or none, then alternating, from user to user
    chosen: str
    rejected: str
    source: str  # "folder/file:line"
    options: dict[str, Any] = field(default_factory=dict)  # of the chat template

    @property
    def opening(self) -> str:
        """The first user turn's text: pairs that share it belong in the same split."""
        return next(turn["content"] for turn in self.prompt if turn["role"] == "user")


def _either(test: Callable[[Side], bool]) -> Callable[[Side, Side], bool]:
    return lambda chosen, rejected: test(chosen) or test(rejected)


# In this order: a rule may rely on those before it; the later ones need a prompt that both sides share.
DROPS: dict[str, Callable[[Side, Side], bool]] = {
    "no_preference": lambda chosen, rejected: chosen is rejected,
    "no_final_assistant": _either(lambda side: not side.turns or side.turns[-1]["role"] != "assistant"),
    "text_before_first_turn": _either(lambda side: bool(side.before)),
    "starts_with_assistant": _either(lambda side: opens(side.turns) != "user"),
    "empty_response": _either(lambda side: not side.response),
    "prompts_differ": lambda chosen, rejected: chosen.prompt != rejected.prompt,
    "prompt_ends_with_assistant": lambda chosen, _: chosen.prompt[-1]["role"] == "assistant",
    "empty_turn": lambda chosen, _: not all(turn["content"] for turn in chosen.prompt),
    "identical_responses": lambda chosen, rejected: chosen.response == rejected.response,
}


def load_pairs(
    source: str,
    data_dir: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Pair], dict[str, int]]:
    """Return the pairs of source, in file order, and counts: rows, this module's rules, kept, merged_turns, layouts.

    source: a hub id such as Anthropic/hh-rlhf, a file or a folder of files (also one of `datasets`). data_dir: a
    folder inside source, or a pattern of its files; without it, all of SUBSETS from the hub, every file of a
    local folder; the red-team transcripts of that repository are left out unless named. revision: a branch,
    tag or commit on the hub. columns: field -> the column's name in the rows. Raises UserError for a missing source,
    for one without a pair and, naming file, line and field, for a malformed row.
    """
    counts = dict.fromkeys(["rows", *DROPS, "kept", "merged_turns"], 0)
    layouts: Counter[str] = Counter()
    pairs: list[Pair] = []
    unread: list[tuple[Any, str]] = []  # rows of which neither side has a turn, and what the first one is
    for path in fetch_pairs(source, data_dir, revision):
        # The parent folder distinguishes the subsets' train.jsonl.gz; the full path would be specific to this machine.
        shown = f"{path.absolute().parent.name}/{path.name}"
        for number, row in read_rows(path):
            counts["rows"] += 1
            where = f"{path}:{number}"
            row = renamed(row, columns or {}, where)
            layout, chosen, rejected = pair_sides(row, where)
            if not chosen.turns and not rejected.turns:
                unread.append((row if not unread else None, where))
            layouts[f"layout_{layout}"] += 1
            reason = next((name for name, holds in DROPS.items() if holds(chosen, rejected)), None)
            counts[reason or "kept"] += 1
            if reason is None:
                prompt = _merged(chosen.prompt)
                counts["merged_turns"] += len(prompt) < len(chosen.prompt)
                said = chosen.response, rejected.response
                pairs.append(Pair(prompt, *said, f"{shown}:{number}", template_options(row, where)))
    if unread and len(unread) == counts["rows"]:
        raise unknown_pair(*unread[0])
    if not pairs:
        raise UserError(f"{source}: expected preference pairs, found {reasons(counts, 'row', DROPS)}")
    return pairs, counts | layouts


def split_pairs(
    pairs: Sequence[Pair], seed: int, n_train: int, n_validation: int, n_test: int, gold: bool = False
) -> dict[str, list[Pair]]:
    """Return {"train", "validation", "test"}, no two sharing an opening (white space and case aside).

    Test and validation are filled first, see `split_by_group`; train may come out shorter than requested.
    Deterministic by seed, whatever the order of pairs. gold: the pairs of a second reward model, which share no
    opening with the train and validation pairs of the first; the test pairs are the same. Raises UserError if
    test or validation cannot be filled or train is empty.
    """
    sizes = {"test": n_test, "validation": n_validation, "train": n_train}
    second = {"gold_validation": n_validation, "gold_train": n_train} if gold else {}  # filled after the first model's
    splits = split_by_group(pairs, lambda pair: text_key(pair.opening), seed, sizes | second)
    require_sizes(splits, sizes | second, "preference pairs", train="gold_train" if gold else "train")
    prefix = "gold_" if gold else ""
    return {"train": splits[prefix + "train"], "validation": splits[prefix + "validation"], "test": splits["test"]}


def openings(pairs: Sequence[Pair]) -> list[str]:
    """Digests of the pairs' openings, sorted, to tell later whether two models were trained on the same ones."""
    return sorted({hashlib.sha256(text_key(pair.opening).encode()).hexdigest()[:16] for pair in pairs})


def fetch_pairs(source: str, data_dir: str | None, revision: str | None) -> list[Path]:
    """Fetch the files that `load_pairs` reads and return their paths; a UserError if there are none."""
    if data_dir is None and source == HUB_ID and is_hub_id(source):
        return fetch(source, [f"{folder}/{pattern}" for folder in SUBSETS for pattern in _PATTERNS], revision)
    files = fetch_data(source, _PATTERNS, data_dir, revision, "data_dir")
    if data_dir is not None or is_hub_id(source):
        return files
    pairs = [path for path in files if _RED_TEAM not in path.parts[len(local_path(source).parts) :]]
    if not pairs:
        raise UserError(f"{source}: expected files of preference pairs, found only {_RED_TEAM}")
    return pairs


def _merged(prompt: list[Turn]) -> list[Turn]:
    """Join consecutive turns by one speaker: chat templates expect alternating roles."""
    merged: list[Turn] = []
    for turn in prompt:
        if merged and merged[-1]["role"] == turn["role"]:
            merged[-1] = {**turn, "content": f"{merged[-1]['content']}\n{turn['content']}"}
        else:
            merged.append(turn)
    return merged
