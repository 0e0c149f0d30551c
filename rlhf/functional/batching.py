"""Rows of token ids as batches: padding, masks, and which rows go through a model together."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """B rows -> (ids int [B, L], mask bool [B, L]), real tokens at the right. For prompts to be continued."""
    return _pad(rows, pad_id, device, left=True)


def right_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """B rows -> (ids int [B, L], mask bool [B, L]), real tokens at the left. For finished texts."""
    return _pad(rows, pad_id, device, left=False)


def _pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, columns] = torch.tensor(row, dtype=torch.long)
        mask[i, columns] = True
    return to_device(ids, device), to_device(mask, device)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to the device without a wait: from pinned memory, behind what is queued there."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    try:
        x = x.pin_memory()
    except RuntimeError:  # some machines allow a process little of it: then the copy is waited for
        return x.to(device)
    return x.to(device, non_blocking=True)


def to_device_together(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """CPU tensors of whole numbers or of True and False, by one copy; each has its shape and type again."""
    if torch.device(device).type == "cpu":
        return list(tensors)
    together = to_device(torch.cat([x.reshape(-1).long() for x in tensors]), device)
    parts = together.split([x.numel() for x in tensors])
    return [part.view(x.shape).to(x.dtype) for part, x in zip(parts, tensors, strict=True)]


def left_aligned(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's real tokens to its start, in order: int [B, L], bool [B, L] -> the same shapes."""
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def position_ids(attention_mask: Tensor) -> Tensor:
    """attention_mask: bool or int [B, L] -> int [B, L]; the first real token of each row is at position 0.

    Models with absolute positions (GPT-2) need it, or left padding shifts what they see. Pads get 0.
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def last_index(mask: Tensor) -> Tensor:
    """mask: bool [B, L] -> int [B]; column of the last True of each row, 0 for a row without one."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (columns * mask).amax(dim=1)


# What one more pass costs, in tokens, and a place of its rectangle: that of packed texts is there in attention only.


class Cost(NamedTuple):
    """What a group of rows costs: a constant, and so much per row and per place of its rectangle."""

    group: float
    place: float
    row: float = 0.0


_COSTS = {"cpu": Cost(32, 1.0), "gpu": Cost(4096, 1.0), "packed": Cost(100, 0.1)}


def cheapest_groups(lengths: Sequence[int], most: int, cost: Cost, budget: int | None = None) -> list[list[int]]:
    """Rows in groups of at most `most`, each of neighbours in length, so that the sum of costs is least.

    lengths: of each row, in any order, any unit; budget: places of a group's rectangle at most, if it has several rows.
    Returns row numbers, groups from short to long. Exact, by dynamic programming over the sorted rows: n x most costs.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best, start = [0.0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        least, where = math.inf, end - 1
        for begin in range(max(0, end - most), end):
            rows = end - begin
            if budget is not None and rows > 1 and rows * longest > budget:
                continue
            total = best[begin] + (rows * longest * cost.place + cost.group + rows * cost.row)
            if total < least:
                least, where = total, begin
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
    cost = _COSTS["packed" if packed else "cpu" if device == "cpu" else "gpu"]
    return cheapest_groups(lengths, len(lengths) if budget is not None else most, cost, budget)
