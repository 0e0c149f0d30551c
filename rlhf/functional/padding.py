"""Ragged rows of token ids as rectangles; the mask, never the pad's id, says what is real."""

from collections.abc import Sequence

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
