"""Split a data set so that no two splits share a group.

Rows that belong together (the same opening question, the same conversation tree) must not be in two splits, or the
test score measures memorisation. So whole groups are assigned, never single rows.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from rlhf.errors import UserError

T = TypeVar("T")


def text_key(text: str) -> str:
    """Return a key that equal texts share: runs of white space as one blank, case folded."""
    return " ".join(text.split()).casefold()


def split_by_group(
    items: Iterable[T],
    key: Callable[[T], str],
    seed: int,
    sizes: Mapping[str, int],
    order: Callable[[T], Any] = repr,
) -> dict[str, list[T]]:
    """Assign items to the splits named in sizes (name -> rows) so that no group is in two splits.

    Groups (items of equal key) are shuffled by seed. Splits are filled in the order of sizes: each takes whole groups
    until it has its size and is then truncated to it; the surplus rows are dropped, never moved to another split. A
    split is short if the groups run out; the caller decides whether that is an error. The result does not depend on
    the order of items: keys are sorted before the shuffle, rows in a group by `order`. Raises UserError for a negative
    size.
    """
    for name, size in sizes.items():
        if size < 0:
            raise UserError(f"split '{name}': expected a size of 0 or more, found {size}")
    groups: dict[str, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    deck = iter(keys)
    return {name: _deal(deck, groups, size, order) for name, size in sizes.items()}


def _deal(deck: Iterable[str], groups: Mapping[str, list[T]], size: int, order: Callable[[T], Any]) -> list[T]:
    rows: list[T] = []
    # Check the size before drawing a key: a drawn key is lost to the next split.
    while len(rows) < size and (drawn := next(iter(deck), None)) is not None:
        rows += sorted(groups[drawn], key=order)
    return rows[:size]


def require_sizes(splits: Mapping[str, list[T]], sizes: Mapping[str, int], what: str, train: str = "train") -> None:
    """Raise UserError, with the counts, if train is empty or another split has fewer rows than its size."""
    short = [name for name, size in sizes.items() if name != train and len(splits[name]) < size]
    if not splits[train]:
        short.append(train)
    if short:
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        found = ", ".join(f"{name} {len(splits[name])}" for name in sizes)
        raise UserError(f"not enough {what} for {' and '.join(short)}: expected {asked}; found {found}")
