"""Measurements of the device for gpu_check, in its own process: python -m rlhf.benchmark.probe device|profile [RUN]."""

import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from rlhf import PPOTrainer
from rlhf.benchmark import ppo
from rlhf.benchmark.work import RESULT, read_run
from rlhf.perf.hardware import matmul_peak, memory_bandwidth
from rlhf.ppo.trainer import PhaseTimer

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "deepspeed", "bitsandbytes", "triton")
_LAUNCHES = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"}
_WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
_COUNTED = _LAUNCHES | _WAITS | {"cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaMalloc", "cudaFree"}
_MARK = "phase: "
_ROWS = 25  # of the profiler's table


def device_report() -> dict[str, Any]:
    """Device, libraries and measured speeds."""
    there = torch.cuda.is_available()
    device = torch.device("cuda" if there else "cpu")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if there else f"cpu, {torch.get_num_threads()} threads",
        "host": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    if there:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "GPUs seen": torch.cuda.device_count(),
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory (GiB)": round(properties.total_memory / 2**30, 1),
            "CUDA": torch.version.cuda,
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "bf16 in hardware": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    found |= {
        "fp32 (TFLOP/s)": matmul_peak(device, torch.float32) / 1e12,
        "bf16 (TFLOP/s)": matmul_peak(device, torch.bfloat16) / 1e12,
        "memory (GB/s)": memory_bandwidth(device) / 1e9,
        "launch (us)": 1e6 * _a_call(lambda x: x.add_(1), device, wait=False),
        "launch and wait (us)": 1e6 * _a_call(lambda x: x.add_(1), device, wait=True),
    }
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _a_call(call: Callable[[torch.Tensor], Any], device: torch.device, wait: bool, n: int = 2000) -> float:
    """Seconds per call, over n calls on a tensor of one number; wait: synchronise after each call."""
    x = torch.zeros(1, device=device)
    call(x)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    for _ in range(n):
        call(x)
        if wait:
            synchronise()
    seconds = time.perf_counter() - start  # the queue has room for n kernels, so the host did not wait
    synchronise()
    return seconds / n


class _MarkedTimer(PhaseTimer):
    """Names the phases in the profiler's record."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time and mark the block."""
        with super().__call__(phase), record_function(_MARK + phase):
            yield


class MarkedTrainer(PPOTrainer):
    """A trainer with marked phases."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.timer = _MarkedTimer(self.accelerator.device)


class SecondStep(TrainerCallback):
    """Profiles the second step; the first one warms up."""

    def __init__(self, profiler: AbstractContextManager[Any]) -> None:
        self.profiler, self.begun = profiler, 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the profiler at the second step."""
        self.begun += 1
        if self.begun == 2:
            self.profiler.__enter__()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the profiler at the end of the second step."""
        if self.begun == 2:
            self.profiler.__exit__(None, None, None)


def profiled(given: dict[str, Any]) -> dict[str, Any]:
    """Calls by phase and the profiler's table for one PPO step. given: a Run as for `worker`."""
    there = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if there else [])])
    with tempfile.TemporaryDirectory() as folder:
        result = ppo.rlhf(read_run(given), folder, MarkedTrainer, [SecondStep(profiler)])
    events = profiler.events() or []
    sort = "self_device_time_total" if there else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=sort, row_limit=_ROWS, max_name_column_width=70)
    return {
        "calls": calls_by_phase([(e.name, e.time_range.start, e.time_range.end) for e in events], there),
        "tokens": result["response_tokens"][1],
        "table": table,
    }


def calls_by_phase(events: list[tuple[str, float, float]], cuda: bool) -> dict[str, dict[str, int]]:
    """(name, start, end) of each event -> counts by phase; `rest` for events outside phases.

    On CUDA: launches, waits, and other calls by name; on a CPU: operations.
    """
    there = phases(events)
    found: dict[str, Counter[str]] = {phase: Counter() for phase in [*there, "rest"]}
    for (name, _, _), phase in zip(events, there, strict=True):
        if kind := _kind(name, cuda):
            found[phase][kind] += 1
    return {phase: dict(sorted(counts.items())) for phase, counts in found.items()}


def phases(events: list[tuple[str, float, float]]) -> list[str]:
    """(name, start, end) of each event -> the phase of a `MarkedTrainer` that it is in; `rest` for none."""
    marks = [(name.removeprefix(_MARK), start, end) for name, start, end in events if name.startswith(_MARK)]
    return [next((mark for mark, begin, end in marks if begin <= start <= end), "rest") for _, start, _ in events]


def _kind(name: str, cuda: bool) -> str | None:
    if not cuda:
        return "operations" if name.startswith("aten::") else None
    return "launches" if name in _LAUNCHES else "waits" if name in _WAITS else name if name in _COUNTED else None


def main() -> None:
    """Print one line that starts with RESULT."""
    what, given = sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    print(RESULT + json.dumps(device_report() if what == "device" else profiled(given)))


if __name__ == "__main__":
    main()
