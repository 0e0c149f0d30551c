import random
from itertools import combinations

import pytest

from rlhf.data.splits import require_sizes, split_by_group, text_key
from rlhf.errors import UserError

# 30 groups of 1, 2 or 3 rows: 10 * (1 + 2 + 3) = 60 rows.
ROWS = [(f"group{number:02}", row) for number in range(30) for row in range(1 + number % 3)]
SIZES = {"test": 7, "validation": 11, "train": 1000}


def group(row: tuple[str, int]) -> str:
    return row[0]


def test_no_group_stands_in_two_splits() -> None:
    for seed in range(20):
        splits = split_by_group(ROWS, group, seed, SIZES)
        for one, other in combinations(splits.values(), 2):
            assert not {group(row) for row in one} & {group(row) for row in other}


def test_splits_have_their_size_and_cut_rows_are_in_none() -> None:
    for seed in range(20):
        splits = split_by_group(ROWS, group, seed, SIZES)
        assert [len(splits[name]) for name in ("test", "validation")] == [7, 11]
        held_out = {group(row) for name in ("test", "validation") for row in splits[name]}
        assert sorted(splits["train"]) == [row for row in ROWS if group(row) not in held_out]


def test_same_seed_same_splits_in_any_input_order() -> None:
    shuffled = ROWS[:]
    random.Random(5).shuffle(shuffled)
    assert split_by_group(shuffled, group, 3, SIZES) == split_by_group(ROWS, group, 3, SIZES)
    assert split_by_group(ROWS, group, 4, SIZES) != split_by_group(ROWS, group, 3, SIZES)


def test_an_exactly_filled_split_takes_no_group_from_the_next() -> None:
    rows = ["a", "b", "c", "d"]
    splits = split_by_group(rows, str, 0, {"none": 0, "first": 2, "second": 2})
    assert splits["none"] == []
    assert sorted(splits["first"] + splits["second"]) == rows


def test_a_split_comes_out_short_when_the_groups_run_out() -> None:
    assert split_by_group(["a", "a"], str, 0, {"first": 3, "second": 1}) == {
        "first": ["a", "a"],
        "second": [],
    }


def test_a_negative_size_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"^split 'test': expected a size of 0 or more, found -1$"):
        split_by_group(ROWS, group, 0, {"test": -1})


def test_require_sizes_names_the_splits_and_the_counts() -> None:
    sizes = {"test": 2, "train": 5}
    require_sizes({"test": [1, 2], "train": [3]}, sizes, "rows")
    with pytest.raises(UserError) as short:
        require_sizes({"test": [1], "train": []}, sizes, "rows")
    assert str(short.value) == "not enough rows for test and train: expected test 2, train 5; found test 1, train 0"


def test_text_key_ignores_case_and_white_space() -> None:
    assert text_key("  Größe\n\tOF  it ") == "grösse of it"
