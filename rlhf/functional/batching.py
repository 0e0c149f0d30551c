"""Which rows go through a model together."""

from collections.abc import Callable, Sequence


def cheapest_groups(lengths: Sequence[int], most: int, cost: Callable[[int, int], float]) -> list[list[int]]:
    """Rows in groups of at most `most`, each of neighbours in length, so that the sum of costs is least.

    lengths: of each row, in any order, any unit; cost(rows, longest): of a group. Returns row numbers, groups from
    short to long. Exact, by dynamic programming over the sorted rows: n x most calls of `cost`.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best, start = [0.0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        options = ((best[s] + cost(end - s, longest), s) for s in range(max(0, end - most), end))
        least, where = min(options)
        best.append(least)
        start.append(where)
    groups, end = [], len(order)
    while end:
        groups.append(order[start[end] : end])
        end = start[end]
    return groups[::-1]
