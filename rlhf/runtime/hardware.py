"""What this machine can do at most, measured and not looked up: matrix products and memory."""

import math
import time
from collections.abc import Callable
from functools import cache

import torch

_TRIES = 3  # at least
_SPENT = 0.03  # seconds at least: where others use the machine, the best of many short calls is still undisturbed
_TOO_LONG = 0.04  # seconds of one call
_SIZES = {"cpu": (512, 1024, 2048, 4096), "gpu": (1024, 2048, 4096)}
_COPIED = {"cpu": (2**25,), "gpu": (2**28, 2**26, 2**24)}  # bytes, more than caches hold; less where memory is full
_AT_ONCE = {"cpu": 1, "gpu": 10}  # calls between two looks at the clock: a GPU's are queued


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product, as PyTorch is set here (threads, TF32); once a process.

    inf where there was no memory for any: shares of the limit are 0 then, and training goes on.
    """
    kind, best = _kind(device), 0.0
    for n in _SIZES[kind]:
        try:
            a, b, out = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(3))
            seconds = _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)  # type: ignore[misc]
        except torch.OutOfMemoryError:  # what a smaller one has shown has to do
            break
        best = max(best, 2 * n**3 / seconds)
        if 8 * seconds > _TOO_LONG:
            break
    return best or math.inf


@cache
def memory_bandwidth(device: torch.device) -> float:
    """Bytes read or written a second by a large copy; once a process. inf as for `matmul_peak`."""
    for size in _COPIED[_kind(device)]:
        try:
            return _copied(size, device)
        except torch.OutOfMemoryError:
            continue
    return math.inf


def _copied(size: int, device: torch.device) -> float:
    a, b = (torch.ones(size, device=device, dtype=torch.uint8) for _ in range(2))
    return 2 * size / _fastest(lambda: b.copy_(a), device)


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "gpu"


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the best of a few after one that warms up."""
    times, calls = list[float](), _AT_ONCE[_kind(device)]
    while len(times) <= _TRIES or sum(times[1:]) * calls < _SPENT:
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        _wait(device)
        times.append((time.perf_counter() - start) / calls)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
