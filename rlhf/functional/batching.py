"""Which rows go through a model together."""

from collections.abc import Callable, Sequence

# What one more pass costs, in tokens, and a place of its rectangle: that of packed texts is there in attention only.
_COSTS = {"cpu": (32, 1.0), "gpu": (4096, 1.0), "packed": (100, 0.1)}


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


def passes_of(
    lengths: Sequence[int], most: int, device: str, budget: int | None = None, packed: bool = False
) -> list[list[int]]:
    """Rows of token lengths in passes of at most `most`, or of at most `budget` padded tokens, that cost least.

    A pass costs its padded tokens and its launches. device: "cpu", or any other kind; packed: models get texts
    without padding. Row numbers, from short to long.
    """
    a_pass, a_token = _COSTS["packed" if packed else "cpu" if device == "cpu" else "gpu"]

    def cost(rows: int, longest: int) -> float:
        over = budget is not None and rows > 1 and rows * longest > budget
        return float("inf") if over else rows * longest * a_token + a_pass

    return cheapest_groups(lengths, len(lengths) if budget is not None else most, cost)
