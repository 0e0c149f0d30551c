"""The machine's limits: as other means measure them, and once a process."""

import math
import time

import numpy
import pytest
import torch

from rlhf.benchmark.clock import most_memory
from rlhf.memory_estimate.account import device_bytes
from rlhf.perf import hardware
from rlhf.perf.hardware import matmul_peak, memory_bandwidth
from rlhf.ppo.trainer import PhaseTimer

CPU = torch.device("cpu")


def best_of(work, calls):
    """Seconds."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def agree(found, seconds_by_numpy, amount):
    """Whether both are within a factor of 3 at least once: other work disturbs now one, now the other."""
    return any(1 / 3 < found() / (amount / seconds_by_numpy()) < 3 for _ in range(20))


def test_the_peak_is_what_numpy_reaches_too():
    a = numpy.ones((1024, 1024), dtype=numpy.float32)
    peak = matmul_peak.__wrapped__  # measures again at each call
    assert agree(lambda: peak(CPU, torch.float32), lambda: best_of(lambda: a @ a, 20), 2 * 1024**3)


def test_a_copy_in_numpy_is_as_fast_as_the_bandwidth():
    a, b = numpy.ones(2**26, dtype=numpy.uint8), numpy.ones(2**26, dtype=numpy.uint8)
    bandwidth = memory_bandwidth.__wrapped__
    assert agree(lambda: bandwidth(CPU), lambda: best_of(lambda: numpy.copyto(b, a), 5), 2 * 2**26)


@pytest.mark.parametrize("measure", [lambda: matmul_peak(CPU, torch.float64), lambda: memory_bandwidth(CPU)])
def test_it_is_measured_once(measure, monkeypatch):
    first = measure()
    monkeypatch.setattr(hardware, "_fastest", None)
    assert first > 0
    assert measure() == first


def test_the_largest_matrix_that_is_not_too_slow_counts(monkeypatch):
    seconds = iter([0.001, 0.004, 0.1])  # 512, 1024 and 2048 wide; the third is too slow for a fourth
    monkeypatch.setattr(hardware, "_fastest", lambda *_: next(seconds))
    assert matmul_peak.__wrapped__(CPU, torch.float32) == 2 * 1024**3 / 0.004


def test_without_memory_for_a_large_matrix_a_small_one_counts(monkeypatch):
    monkeypatch.setattr(hardware, "_fastest", lambda *_: 0.001)
    ones = torch.ones

    def little_memory(*shape, **options):
        if shape[0] > 512:
            raise torch.OutOfMemoryError
        return ones(*shape, **options)

    monkeypatch.setattr(torch, "ones", little_memory)
    assert matmul_peak.__wrapped__(CPU, torch.float32) == 2 * 512**3 / 0.001


def test_the_best_of_a_few_calls_after_one_that_warms_up(monkeypatch):
    clock = iter([0.0, 0.001, 1.0, 1.05, 2.0, 2.02, 3.0, 3.03])  # the first call is the fastest, and does not count
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
    assert hardware._fastest(lambda: None, CPU) == pytest.approx(0.02)


def test_without_memory_for_a_large_copy_a_small_one_counts(monkeypatch):
    sizes = []
    ones = torch.ones

    def little_memory(size, **options):
        sizes.append(size)
        if size > 2**24:
            raise torch.OutOfMemoryError
        return ones(size, **options | {"device": "cpu"})

    monkeypatch.setattr(torch, "ones", little_memory)
    monkeypatch.setattr(hardware, "_fastest", lambda *_: 0.5)
    assert memory_bandwidth.__wrapped__(torch.device("cuda")) == 2 * 2**24 / 0.5
    assert sizes == [2**28, 2**26, 2**24, 2**24]


@pytest.mark.parametrize("full", ["from the start", "as it runs"])
def test_without_any_memory_no_limit_is_known_and_the_run_goes_on(monkeypatch, full):
    def none(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(*(torch, "ones", none) if full == "from the start" else (hardware, "_fastest", none))
    assert memory_bandwidth.__wrapped__(CPU) == math.inf
    assert matmul_peak.__wrapped__(CPU, torch.float32) == math.inf


class Xpu:
    """torch.xpu, as far as it is asked."""

    @staticmethod
    def get_device_name(device):
        return f"Arc {device.index}"

    @staticmethod
    def get_device_properties(device):
        return type("Properties", (), {"total_memory": 16e9})


@pytest.fixture
def xpu(monkeypatch):
    """A machine with four of Intel's, as PyTorch's device-independent interface shows them."""
    device = torch.device("xpu", 0)
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: Xpu)
    answers = {"is_available": True, "device_count": 4, "current_accelerator": device}
    for name, value in answers.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 5_000)
    return device


def test_a_device_that_is_not_nvidias_is_named_and_measured(xpu):
    assert hardware.device_name(xpu) == "Arc 0"
    assert hardware.peak_memory(xpu) == 5_000
    assert device_bytes(use_cpu=False) == 16e9
    assert most_memory() == 5_000


def test_a_cpu_is_named_by_its_threads_and_measured_as_a_process():
    assert hardware.device_name(CPU) == f"cpu, {torch.get_num_threads()} threads"
    assert 10e6 < hardware.peak_memory(CPU) < 100e9


def test_phases_are_timed_to_the_end_of_what_was_queued(xpu, monkeypatch, tmp_path):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    timer = PhaseTimer(xpu)
    with timer("learn"):
        assert waits == []  # nothing is left of the phase before
    assert waits == [xpu]
    assert timer.seconds["learn"] >= 0


def test_devices_that_are_not_used_are_pointed_out(xpu, monkeypatch):
    line = "devices: 1 of the 4 that this machine has, one per process; to use all: accelerate launch --num_processes 4"
    assert hardware.unused_devices(xpu).startswith(line)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert hardware.unused_devices(xpu) is None
    assert hardware.unused_devices(CPU) is None


def test_where_a_device_keeps_no_record_the_process_counts(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 5_000)
    assert [hardware.peak_memory(torch.device(kind)) for kind in ("cuda", "xpu")] == [5_000] * 2
    assert all(hardware.peak_memory(torch.device(kind)) > 10_000_000 for kind in ("cpu", "mps"))


def test_a_product_of_twice_the_width_that_would_take_too_long_is_not_tried(monkeypatch):
    seconds = iter([0.001, 0.006, 0.0001])  # eight times 6 ms are more than 40
    monkeypatch.setattr(hardware, "_fastest", lambda *_: next(seconds))
    assert matmul_peak.__wrapped__(CPU, torch.float32) == 2 * 1024**3 / 0.006


def times(monkeypatch, *rounds):
    """A clock by which each look at it and the next are so many seconds apart."""
    ticks = iter([t for i, seconds in enumerate(rounds) for t in (10.0 * i, 10.0 * i + seconds)])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)


def test_three_calls_at_least_and_as_many_as_take_long_enough(monkeypatch):
    calls = []
    times(monkeypatch, 9.0, 0.5, 0.4, 0.25)
    assert hardware._fastest(lambda: calls.append(1), CPU) == 0.25
    assert len(calls) == 4
    times(monkeypatch, 9.0, *[0.0078125] * 4)  # 31 ms after the first, of ten calls each
    assert hardware._fastest(lambda: calls.append(1), torch.device("cuda")) == pytest.approx(0.00078125)
    assert len(calls) == 4 + 5 * 10


def test_a_layers_speed_is_of_the_fastest_of_eight(monkeypatch):
    seconds = iter([2.0, 1.0, 0.5, 1.0, 2.0, 2.0, 2.0, 0.25, 0.125])
    monkeypatch.setattr(hardware, "_fastest", lambda *_: next(seconds))
    assert hardware.layer_speed(torch.float32) == 2 * 256 * 768 * 3072 / 0.25


def test_a_devices_memory_is_its_own_or_what_is_recommended(monkeypatch):
    def memory(**functions):
        monkeypatch.setattr(torch, "get_device_module", lambda device: type("Module", (), functions))
        return hardware.total_memory(torch.device("cuda", 1))

    assert memory(get_device_properties=lambda device: type("P", (), {"total_memory": 8 + device.index})) == 9.0
    assert memory(recommended_max_memory=lambda: 6) == 6.0
    assert memory() is None
