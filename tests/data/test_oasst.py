import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.oasst import TextPrompt, drop_long, load_prompts, split_prompts
from rlhf.errors import UserError

REAL = Path(__file__).parents[2] / "../shared/data/oasst"
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"no real prompts at {REAL}")


def message(number: int, text: str, role: str = "prompter", **more: Any) -> dict[str, Any]:
    common = {
        "message_id": f"m{number}",
        "message_tree_id": "t",
        "role": role,
        "lang": "en",
        "deleted": False,
    }
    return {**common, "text": text, **more}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def counts_of(**counts: int) -> dict[str, int]:
    names = ("messages", "assistant", "deleted", "other_language", "empty", "duplicate", "kept")
    return {**dict.fromkeys(names, 0), **counts}


def load(*args: Any, **options: Any) -> tuple[list[TextPrompt], dict[str, int]]:
    """load_prompts, without the counts of layouts, which the tests of layouts.py have."""
    prompts, counts = load_prompts(*args, **options)
    layouts = [name for name in counts if name.startswith("layout_")]
    assert sum(counts[name] for name in layouts) == counts["messages"]
    return prompts, {name: n for name, n in counts.items() if name not in layouts}


def test_each_rule_drops_its_messages_once(tmp_path: Path) -> None:
    rows = [
        message(0, " Kept. "),
        message(1, "An answer.", role="assistant", deleted=True, lang="de"),
        message(2, "", deleted=True, lang="de"),
        message(3, "", lang="de"),
        message(4, " \n"),
        message(5, "KEPT. "),
        message(6, "Kept  too.", lang=None),
        message(6, "The same id."),
    ]
    prompts, counts = load([write(tmp_path / "a.jsonl", *rows)])
    assert prompts == [TextPrompt("m0", "t", "Kept."), TextPrompt("m6", "t", "Kept  too.")]
    assert counts == counts_of(messages=8, assistant=1, deleted=1, other_language=1, empty=1, duplicate=2, kept=2)
    _, counts = load([str(tmp_path / "a.jsonl")], lang=None)
    assert counts == counts_of(messages=8, assistant=1, deleted=1, empty=2, duplicate=2, kept=2)


def test_a_tree_is_walked_in_order_at_any_depth(tmp_path: Path) -> None:
    second = message(3, "second", replies=[message(4, "answer", role="assistant")])
    first = message(1, "first", replies=[])
    answers = [message(2, "a", role="assistant", replies=[first, second]), message(5, "b", role="assistant")]
    root = message(0, "root", replies=answers)
    prompts, counts = load([write(tmp_path / "a.jsonl", {"message_tree_id": "T", "prompt": root})])
    assert [(prompt.prompt_id, prompt.tree_id) for prompt in prompts] == [
        ("m0", "T"),
        ("m1", "T"),
        ("m3", "T"),
    ]
    assert counts == counts_of(messages=6, assistant=3, kept=3)


def nested(depth: int) -> str:
    opened = "".join(
        f'{{"message_id": "{n}", "role": "prompter", "lang": "en", "text": "text {n}", "replies": ['
        for n in range(depth)
    )
    return f'{{"message_tree_id": "T", "prompt": {opened}{"]}" * depth}}}\n'


def test_deep_trees(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text(nested(300))
    assert load([str(path)])[1] == counts_of(messages=300, kept=300)
    # Deeper than the JSON decoder itself follows: one line, no traceback.
    path.write_text(nested(20_000))
    with pytest.raises(UserError, match=r"deep\.jsonl:1: expected a JSON value, found one too large"):
        load([str(path)])


def test_plain_lines_and_duplicates_across_sources(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("One?\n\nTwo?\n")
    strings = write(tmp_path / "a.jsonl", " Three? ", "two?", "ONE?", message(1, "Vier?", lang="de"))
    prompts, counts = load([str(tmp_path / "b.txt"), strings])
    ids = [hashlib.sha1(text.encode()).hexdigest()[:16] for text in ("One?", "Two?", "Three?")]
    assert prompts == [TextPrompt(i, i, text) for i, text in zip(ids, ("One?", "Two?", "Three?"), strict=True)]
    assert counts == counts_of(messages=6, duplicate=2, other_language=1, kept=3)


@pytest.mark.parametrize(
    ("row", "start"),
    [
        (7, "expected a message (message_id, message_tree_id, role, text), a tree "),
        ({"text": "x"}, "expected a message (message_id, message_tree_id, role, text), a tree "),
        ({}, "expected a message (message_id, message_tree_id, role, text), a tree "),
        (message(1, "x", role="human"), "field 'role': expected 'prompter' or 'assistant', found 'human'"),
        (message(1, "x", deleted="no"), "field 'deleted': expected true or false, found text"),
        ({**message(1, "x"), "text": None}, "field 'text': expected text, found null"),
        (message(1, "x", lang=3), "field 'lang': expected text, found int"),
        ({"role": "prompter"}, "field 'message_tree_id': expected text, found nothing"),
        ({"prompt": message(1, "x")}, "field 'message_tree_id': expected text, found nothing"),
        ({"message_tree_id": "t", "prompt": {"text": "x"}}, "field 'role': expected text, found nothing"),
        (
            {"message_tree_id": "t", "prompt": message(1, "x", replies={})},
            "field 'replies': expected a list, found an object",
        ),
        (
            {"message_tree_id": "t", "prompt": message(1, "x", replies=["y"])},
            "field 'replies': expected a list of objects, found text in it",
        ),
    ],
)
def test_malformed_rows_are_errors_at_their_line(tmp_path: Path, row: Any, start: str) -> None:
    with pytest.raises(UserError) as caught:
        load([write(tmp_path / "a.jsonl", "fine", row)])
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl:2: {start}")
    assert "\n" not in str(caught.value)


def test_drop_long_keeps_the_limit_itself() -> None:
    prompts = [TextPrompt(str(n), "t", "x" * n) for n in (5, 3, 4)]
    assert drop_long(prompts, lambda prompt: len(prompt.text), 4) == (prompts[1:], 1)


def trees(n_trees: int) -> list[TextPrompt]:
    """n_trees trees of 1, 2, 3, 1, 2, 3, ... prompts."""
    return [TextPrompt(f"{t}-{p}", f"tree{t}", f"text {t} {p}") for t in range(n_trees) for p in range(1 + t % 3)]


def test_split_by_tree_one_prompt_a_tree_held_out() -> None:
    prompts = trees(30)
    split = split_prompts(prompts, 0, n_train=1000, n_eval=10, n_rating=5)
    held_out = [prompt.tree_id for prompt in split.rating + split.evaluation]
    assert (len(split.rating), len(split.evaluation), len(set(held_out))) == (5, 10, 15)
    assert sorted(split.train, key=prompts.index) == [p for p in prompts if p.tree_id not in held_out]
    assert len(split_prompts(prompts, 0, n_train=7, n_eval=10, n_rating=5).train) == 7


def test_split_is_the_seeds_whatever_the_order() -> None:
    prompts = trees(30)
    split = split_prompts(prompts, 0, 20, 10, 5)
    assert split_prompts(random.Random(2).sample(prompts, len(prompts)), 0, 20, 10, 5) == split
    assert split_prompts(prompts, 1, 20, 10, 5) != split
    # Which prompt of a tree is held out is drawn too: over some seeds, not always its first.
    rated = [prompt for seed in range(10) for prompt in split_prompts(prompts, seed, 20, 10, 5).rating]
    assert {prompt.prompt_id[-2:] for prompt in rated} == {"-0", "-1", "-2"}


def test_splits_that_cannot_be_filled_are_errors() -> None:
    with pytest.raises(UserError) as caught:
        split_prompts(trees(6), 0, n_train=5, n_eval=4, n_rating=3)
    assert str(caught.value) == (
        "not enough prompts (6 trees) for evaluation and train: expected rating 3, evaluation 4, train 5; "
        "found rating 3, evaluation 3, train 0"
    )
    with pytest.raises(UserError, match="for train: "):
        split_prompts(trees(6), 0, n_train=5, n_eval=4, n_rating=2)


def rows_of(name: str) -> list[Any]:
    content = (REAL / name).read_bytes()
    text = (gzip.decompress(content) if name.endswith(".gz") else content).decode()
    return [json.loads(line) for line in text.split("\n") if line]


@needs_real
def test_real_trees_and_messages_are_the_same_prompts() -> None:
    messages = rows_of("messages.jsonl.gz")
    mine = {m["message_id"]: (m["message_tree_id"], m["text"]) for m in messages if m["role"] == "prompter"}
    assert (len(messages), len(mine)) == (922, 374)
    for name in ("messages.jsonl.gz", "trees.jsonl.gz"):
        prompts, counts = load([str(REAL / name)])
        assert {prompt.prompt_id: (prompt.tree_id, prompt.text) for prompt in prompts} == mine
        assert counts == counts_of(messages=922, assistant=548, kept=374)
    _, counts = load([str(REAL / "messages.jsonl.gz"), str(REAL / "trees.jsonl.gz")])
    assert counts == counts_of(messages=1844, assistant=1096, duplicate=374, kept=374)


@needs_real
def test_real_splits() -> None:
    lottery = rows_of("prompt_lottery_en.jsonl")
    prompts, counts = load([str(REAL / "trees.jsonl.gz"), str(REAL / "prompt_lottery_en.jsonl")])
    assert (len(lottery), counts["kept"]) == (190, 564)
    split = split_prompts(prompts, 42, n_train=10_000, n_eval=100, n_rating=40)
    parts = [split.train, split.evaluation, split.rating]
    tree_ids = [{prompt.tree_id for prompt in part} for part in parts]
    assert [len(part) for part in parts[1:]] == [100, 40]
    # 80 trees and 190 single lines; 140 are held out and all the rest is trained on.
    assert len(set.union(*tree_ids)) == sum(map(len, tree_ids)) == 80 + 190
    assert len(tree_ids[0]) == 80 + 190 - 140
