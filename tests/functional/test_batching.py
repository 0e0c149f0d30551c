"""Groups are the cheapest there are."""

import random
from functools import cache

import pytest

from rlhf.functional.batching import Cost, cheapest_groups, passes_of


def test_worked_by_hand():
    # Three rows of 10 and one of 100. Together: 400 + 5; apart: 30 + 5 and 100 + 5.
    cost = Cost(group=5, place=1)
    assert cheapest_groups([10, 100, 10, 10], 4, cost) == [[0, 2, 3], [1]]
    assert cheapest_groups([10, 100, 10, 10], 2, cost) == [[0, 2], [3], [1]] or cheapest_groups(
        [10, 100, 10, 10], 2, cost
    ) == [[0], [2, 3], [1]]
    assert cheapest_groups([10, 12, 11], 4, cost) == [[0, 2, 1]]  # 36 + 5 against at least 33 + 10
    assert cheapest_groups([], 4, cost) == []


@pytest.mark.parametrize("seed", range(20))
def test_no_other_grouping_of_neighbours_costs_less(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 50) for _ in range(9)]
    most, launch = draw.randint(1, 9), draw.choice([0, 7, 100])
    numbers = Cost(launch, 1, draw.choice([0, 3]))

    def cost(rows, longest):
        return rows * longest + launch + numbers.row * rows

    ordered = sorted(lengths)

    @cache
    def least(start):
        if start == len(ordered):
            return 0
        ends = range(start + 1, min(start + most, len(ordered)) + 1)
        return min(cost(end - start, ordered[end - 1]) + least(end) for end in ends)

    groups = cheapest_groups(lengths, most, numbers)
    assert sorted(i for group in groups for i in group) == list(range(9))
    assert max(map(len, groups)) <= most
    assert sum(cost(len(g), max(lengths[i] for i in g)) for g in groups) == least(0)


def test_passes_keep_to_rows_or_to_a_budget_of_tokens():
    lengths = [10] * 5 + [100]
    # On a CPU a pass costs as much as 32 tokens: 82 for the short rows together, 132 for the long one.
    assert passes_of(lengths, 8, "cpu") == [[0, 1, 2, 3, 4], [5]]
    assert sorted(map(len, passes_of(lengths, 4, "cpu"))) == [1, 1, 4]
    # On a GPU one costs as much as 4,096: padding is cheaper.
    assert passes_of(lengths, 8, "cuda") == [[0, 1, 2, 3, 4, 5]]
    # Without padding, only attention sees any: 160 for a pass of all, 205 and 210 for two.
    assert passes_of(lengths, 8, "cpu", packed=True) == [[0, 1, 2, 3, 4, 5]]
    assert sorted(map(len, passes_of(lengths, 4, "cpu", packed=True))) == [2, 4]
    # A budget in the place of `most`: three rows of 10 at once, and a row that is longer by itself.
    assert sorted(map(len, passes_of(lengths, 1, "cuda", budget=30))) == [1, 2, 3]
