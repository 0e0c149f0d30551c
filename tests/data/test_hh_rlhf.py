import gzip
import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.hh_rlhf import Pair, load_pairs, openings, split_pairs
from rlhf.errors import UserError

REAL = Path(__file__).parents[2] / "../shared/data/hh-rlhf/harmless-base.jsonl.gz"
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"no real pairs at {REAL}")

H, A = "\n\nHuman:", "\n\nAssistant:"
DROPS = (
    "no_preference",
    "no_final_assistant",
    "text_before_first_turn",
    "starts_with_assistant",
    "empty_response",
    "prompts_differ",
    "prompt_ends_with_assistant",
    "empty_turn",
    "identical_responses",
)


def load_rows(folder: Path, *rows: Any) -> tuple[list[Pair], dict[str, int]]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_pairs(str(path))


def sides(chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": chosen, "rejected": rejected}


def test_a_pair_and_its_trl_row(tmp_path: Path) -> None:
    prompt = f"{H} Hi \n there.{A} Hello.  Human: is no turn{H}  And\n\n\nHumans: too?"
    [pair], counts = load_rows(tmp_path, sides(f"{prompt}{A} Yes. ", f"{prompt} {A}No.\n"))
    assert pair.prompt == [
        {"role": "user", "content": "Hi \n there."},
        {"role": "assistant", "content": "Hello.  Human: is no turn"},
        {"role": "user", "content": "And\n\n\nHumans: too?"},
    ]
    assert (pair.chosen, pair.rejected, pair.opening) == ("Yes.", "No.", "Hi \n there.")
    assert pair.source == f"{tmp_path.name}/rows.jsonl:1"
    assert counts == {"rows": 1, **dict.fromkeys(DROPS, 0), "kept": 1, "merged_turns": 0, "layout_hh_text": 1}


GOOD = f"{H} q{A} a"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("", GOOD, "no_final_assistant"),
        (GOOD, "no marks", "no_final_assistant"),
        (GOOD, f"{H} q{A} a{H} more", "no_final_assistant"),
        (f"x{GOOD}", GOOD, "text_before_first_turn"),
        (GOOD, f"{A} a", "starts_with_assistant"),
        (f"{H} q{A} ", GOOD, "empty_response"),
        (GOOD, f"{H} q{A}", "empty_response"),
        (GOOD, f"{H} other{A} b", "prompts_differ"),
        (GOOD, f"{H} q{A} a{H} q{A} a", "prompts_differ"),
        (f"{H} q{A} a{A} b", f"{H} q{A} a{A} c", "prompt_ends_with_assistant"),
        (f"{H} {A} a", f"{H}{A} b", "empty_turn"),
        (f"{H} q{A} {H} q{A} a", f"{H} q{A} {H} q{A} b", "empty_turn"),
        (GOOD, f"{H} q {A}a\n", "identical_responses"),
        # More than one rule holds: the first in the order counts.
        (f"x{H} q", GOOD, "no_final_assistant"),
        (f"x{A} ", GOOD, "text_before_first_turn"),
        (f"{A} ", f"{A} ", "starts_with_assistant"),
        (f"{H} p{A} ", GOOD, "empty_response"),
        (f"{H} q{A} a{A} b", f"{H} q{A} d{A} c", "prompts_differ"),
        (f"{H} {A} a{A} b", f"{H} {A} a{A} b", "prompt_ends_with_assistant"),
        (f"{H} {A} a", f"{H} {A} a", "empty_turn"),
    ],
)
def test_each_rule_drops_its_rows_once(tmp_path: Path, chosen: str, rejected: str, reason: str) -> None:
    pairs, counts = load_rows(tmp_path, sides(GOOD, f"{H} q{A} b"), sides(chosen, rejected))
    expected = {"rows": 2, **dict.fromkeys(DROPS, 0), reason: 1, "kept": 1, "merged_turns": 0, "layout_hh_text": 2}
    assert counts == expected
    assert len(pairs) == 1


def test_turns_in_a_row_are_merged_and_counted(tmp_path: Path) -> None:
    prompt = f"Human: 1{H} 2{H} 3{A} 4{A} 5{H} 6"
    [pair], counts = load_rows(tmp_path, sides(f"{prompt}{A} a", f"{prompt}{A} b"))
    assert [turn["content"] for turn in pair.prompt] == ["1\n2\n3", "4\n5", "6"]
    assert [turn["role"] for turn in pair.prompt] == ["user", "assistant", "user"]
    assert (counts["kept"], counts["merged_turns"]) == (1, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": GOOD},
            "expected an object with fields 'chosen' and 'rejected', found an object with fields 'chosen': {",
        ),
        ({"chosen": 1, "rejected": GOOD}, "field 'chosen': expected text or messages, found int"),
        ([GOOD], "expected an object with fields 'chosen' and 'rejected', found a list"),
        ("hello", "expected an object with fields 'chosen' and 'rejected', found text"),
        (sides(GOOD, "\udc00"), "field 'rejected': expected Unicode text, found the lone surrogate \\udc00"),
    ],
)
def test_malformed_rows_are_errors_at_their_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_rows(tmp_path, sides(GOOD, f"{H} q{A} b"), row)
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl:2: {message}")


def test_folders_subsets_and_the_red_team(tmp_path: Path) -> None:
    for name in ("harmless-base/test", "harmless-base/train", "helpful-base/test"):
        path = tmp_path / f"{name}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(json.dumps(sides(f"{H} {name}{A} a", f"{H} {name}{A} b")).encode()))
    red_team = tmp_path / "red-team-attempts/red_team_attempts.jsonl.gz"
    red_team.parent.mkdir()
    red_team.write_bytes(gzip.compress(b'[{"transcript": "x"}]'))
    everything, _ = load_pairs(str(tmp_path))
    assert [pair.opening for pair in everything] == [
        "harmless-base/test",
        "harmless-base/train",
        "helpful-base/test",
    ]
    assert load_pairs(str(tmp_path), data_dir="harmless-base")[0] == everything[:2]
    assert load_pairs(str(tmp_path / "helpful-base"))[0] == everything[2:]
    with pytest.raises(UserError, match=r":1: expected an object with fields 'chosen' and 'rejected', found a list"):
        load_pairs(str(tmp_path), data_dir="red-team-attempts")
    with pytest.raises(UserError, match=r": expected a folder 'helpful' in it \(data_dir\), found none"):
        load_pairs(str(tmp_path), data_dir="helpful")


def test_only_a_folder_inside_the_source_is_the_red_teams(tmp_path: Path) -> None:
    folder = tmp_path / "red-team-attempts" / "mine"
    folder.mkdir(parents=True)
    pairs, _ = load_rows(folder, sides(f"{H} q{A} a", f"{H} q{A} b"))
    assert [pair.opening for pair in pairs] == ["q"]


def crafted(number: int, opening: str) -> Pair:
    return Pair([{"role": "user", "content": opening}], "a", "b", f"f:{number}")


def test_splits_share_no_opening_and_ignore_the_order() -> None:
    # 40 openings, each in two spellings that count as one.
    pairs = [crafted(n, f"Question {n // 2}" if n % 2 else f"question  {n // 2}") for n in range(80)]
    splits = split_pairs(pairs, 0, n_train=1000, n_validation=10, n_test=9)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 60, "validation": 10, "test": 9}
    starts = [{pair.opening.lower().replace("  ", " ") for pair in rows} for rows in splits.values()]
    assert not any(one & other for one, other in combinations(starts, 2))
    shuffled = random.Random(1).sample(pairs, len(pairs))
    assert split_pairs(shuffled, 0, 1000, 10, 9) == splits
    assert split_pairs(pairs, 1, 1000, 10, 9) != splits


def test_splits_that_cannot_be_filled_are_errors() -> None:
    pairs = [crafted(n, f"question {n}") for n in range(10)]
    with pytest.raises(UserError, match=r"^not enough preference pairs for validation and train: .* test 8, "):
        split_pairs(pairs, 0, n_train=1, n_validation=3, n_test=8)
    with pytest.raises(UserError, match=r"for train: .* found test 4, validation 6, train 0$"):
        split_pairs(pairs, 0, n_train=5, n_validation=6, n_test=4)


def test_the_second_model_s_pairs_are_none_of_the_first_s() -> None:
    pairs = [crafted(n, f"Question {n // 2}" if n % 2 else f"question  {n // 2}") for n in range(80)]
    first = split_pairs(pairs, 3, n_train=20, n_validation=10, n_test=9)
    second = split_pairs(pairs, 3, n_train=20, n_validation=10, n_test=9, gold=True)
    assert {name: len(rows) for name, rows in second.items()} == {"train": 20, "validation": 10, "test": 9}
    assert second["test"] == first["test"]
    one, other = (openings([*splits["train"], *splits["validation"]]) for splits in (first, second))
    assert len(one) == len(other) == 15  # of two spellings each
    assert not set(one) & set(other)
    assert not set(other) & set(openings(second["test"]))
    with pytest.raises(UserError, match="for gold_validation and gold_train"):
        split_pairs(pairs, 3, n_train=60, n_validation=10, n_test=9, gold=True)


@needs_real
def test_real_pairs() -> None:
    pairs, counts = load_pairs(str(REAL))
    # Worked without the parser: cut each side at its last mark, compare the raw prompts, find empty tails.
    rows = [json.loads(line) for line in gzip.decompress(REAL.read_bytes()).decode().split("\n")[:-1]]
    cut = [(row["chosen"].rpartition(A), row["rejected"].rpartition(A)) for row in rows]
    empty = {n for n, (c, r) in enumerate(cut) if not c[2].strip() or not r[2].strip()}
    differ = {n for n, (c, r) in enumerate(cut) if c[0].strip() != r[0].strip()} - empty
    doubled = {n for n, (c, _) in enumerate(cut) if n not in differ and "A A" in speakers(c[0])}
    assert (len(rows), len(empty), len(differ), len(doubled)) == (1800, 2, 5, 4)
    expected = {"rows": 1800, "empty_response": 2, "prompts_differ": 5, "kept": 1793, "merged_turns": 4}
    expected["layout_hh_text"] = 1800
    assert counts == {**dict.fromkeys(DROPS, 0), **expected}
    kept = [n for n in range(1800) if n not in empty | differ]
    assert [pair.source for pair in pairs] == [f"hh-rlhf/harmless-base.jsonl.gz:{n + 1}" for n in kept]
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        (cut[n][0][2].strip(), cut[n][1][2].strip()) for n in kept
    ]
    for pair in pairs:
        roles = [turn["role"] for turn in pair.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def speakers(prompt: str) -> str:
    return " ".join(line[0] for line in prompt.split("\n\n") if line.startswith(("Human:", "Assistant:")))


@needs_real
def test_real_splits() -> None:
    pairs, _ = load_pairs(str(REAL))
    splits = split_pairs(pairs, 7, n_train=1000, n_validation=200, n_test=300)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 1000,
        "validation": 200,
        "test": 300,
    }
    starts = [{" ".join(pair.opening.lower().split()) for pair in rows} for rows in splits.values()]
    assert not any(one & other for one, other in combinations(starts, 2))
