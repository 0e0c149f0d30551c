"""What this machine can do at most, measured and not looked up: matrix products and memory."""

import math
import resource
import time
from collections.abc import Callable
from functools import cache

import torch
from torch.nn.functional import linear

from rlhf.distributed.devices import local_process_count

_TRIES = 3  # at least

_SPENT = 0.03  # seconds at least: where others use the machine, the best of many short calls is still undisturbed

_TOO_LONG = 0.04  # seconds of one call

_SIZES = {"cpu": (512, 1024, 2048, 4096), "gpu": (1024, 2048, 4096)}

_COPIED = {"cpu": (2**25,), "gpu": (2**28, 2**26, 2**24)}  # bytes, more than caches hold; less where memory is full

_AT_ONCE = {"cpu": 1, "gpu": 10}  # calls between two looks at the clock: a GPU's are queued


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product, as PyTorch is set here (threads, TF32); once a process.

    inf if there was no memory to measure it: shares of the limit are then 0, and training continues.
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


def layer_speed(dtype: torch.dtype) -> float:
    """FLOP/s of a CPU in a layer of a small model, with a micro-batch of tokens: far below the fastest product."""
    tokens, hidden, inner = 256, 768, 3072
    states, weights = torch.ones(tokens, hidden, dtype=dtype), torch.ones(inner, hidden, dtype=dtype)
    best = min(_fastest(lambda: linear(states, weights), torch.device("cpu")) for _ in range(8))
    return 2 * tokens * hidden * inner / best


def _copied(size: int, device: torch.device) -> float:
    a, b = (torch.ones(size, device=device, dtype=torch.uint8) for _ in range(2))
    return 2 * size / _fastest(lambda: b.copy_(a), device)


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "gpu"


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the best of a few after one that warms up."""
    times, calls = list[float](), _AT_ONCE[_kind(device)]
    while len(times) <= _TRIES or sum(times[1:]) * calls < _SPENT:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronise(device)
        times.append((time.perf_counter() - start) / calls)
    return min(times[1:])


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def unused_devices(device: torch.device) -> str | None:
    """One line where this machine's processes see more devices than they use, one each; None where they do not."""
    processes = local_process_count()
    seen = 0 if device.type == "cpu" else torch.accelerator.device_count()
    if seen <= processes:
        return None
    return (
        f"devices: {processes} of the {seen} that this machine has, one per process; to use all: "
        f"accelerate launch --num_processes {seen} --config_file accelerate_configs/multi_gpu.yaml"
    )


def device_name(device: torch.device) -> str:
    """What the device calls itself; a CPU by its threads."""
    module = torch.get_device_module(device)
    if hasattr(module, "get_device_name"):  # CUDA, ROCm, XPU, ...
        return str(module.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the device, or on a CPU that the process held resident."""
    if device.type not in ("cpu", "mps"):  # PyTorch keeps no record of the most on Apple's
        return torch.accelerator.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory(device: torch.device) -> float | None:
    """Bytes of an accelerator; None where nothing says."""
    module = torch.get_device_module(device)
    if hasattr(module, "get_device_properties"):
        return float(module.get_device_properties(device).total_memory)
    return float(module.recommended_max_memory()) if hasattr(module, "recommended_max_memory") else None
