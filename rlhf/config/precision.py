"""The device and the precision of a run: on a CPU bf16 is measured against fp32, not read off a flag."""

import os
import time
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch.nn.functional import linear
from transformers import TrainingArguments

from rlhf.distributed.collectives import from_main, join_processes
from rlhf.distributed.devices import check_processes, cpu_is_asked_for, process_count
from rlhf.distributed.launch import launcher_precision, wants_deepspeed
from rlhf.distributed.operators import build_communication
from rlhf.errors import UserError
from rlhf.file_types import Precision

WINS = 1.2  # times as fast as in fp32 at least, or bf16's rounding is not worth it

# A micro-batch of a small model, as one trains it on a CPU: tokens, hidden size, intermediate size.
_SHAPE = (256, 768, 3072)

_TRIES, _SPENT = 5, 0.04  # calls of each, and seconds of all calls, at least

_HOPELESS = 5.0  # a first bf16 call that takes so many times as long as fp32's: no hardware for it, so no more calls


@cache
def bf16_speed() -> float:
    """How many times as fast as in fp32 this CPU multiplies a model's matrices in bf16, with the threads of now.

    Measured in a few milliseconds, once per process. The two take turns, so that another program's load meets both,
    and the best call of each counts. This starts PyTorch's threads: a process that has called it must not fork.
    """
    tokens, hidden, inner = _SHAPE
    calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        states, weights = torch.ones(tokens, hidden, dtype=dtype), torch.ones(inner, hidden, dtype=dtype)
        calls[dtype] = lambda states=states, weights=weights: linear(states, weights)
    return _speed(calls[torch.float32], calls[torch.bfloat16], time.perf_counter)


def _speed(slow: Callable[[], object], fast: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the best call of `slow` over those of `fast`, to two decimals."""
    times: tuple[list[float], list[float]] = ([], [])

    def both() -> None:
        for work, taken in zip((slow, fast), times, strict=True):
            start = clock()
            work()
            taken.append(clock() - start)

    with torch.no_grad():
        slow()  # the first call is slower: threads start
        both()
        while times[1][0] < _HOPELESS * times[0][0] and (len(times[0]) <= _TRIES or sum(map(sum, times)) < _SPENT):
            both()
    return round(min(times[0]) / max(min(times[1]), 1e-9), 2)


def bf16_is_fast(use_cpu: bool = False) -> bool:
    """Whether bf16 is the better choice here: measured on a CPU, asked of a GPU's hardware. Of this process alone.

    use_cpu: ask about the CPU even if there is an accelerator.
    """
    return _bf16(use_cpu)[0]


def _bf16(use_cpu: bool) -> tuple[bool, str]:
    """Whether to take bf16, and why."""
    if not use_cpu and torch.accelerator.is_available():
        module = torch.get_device_module(torch.accelerator.current_accelerator())
        # CUDA, ROCm and XPU say so; older GPUs only emulate it.
        found = hasattr(module, "is_bf16_supported") and module.is_bf16_supported(including_emulation=False)
        return bool(found), f"this device has {'' if found else 'no '}bf16"
    speed = bf16_speed()
    return speed >= WINS, f"bf16 measured: {speed:g} times as fast"


def choose_hardware(args: TrainingArguments) -> None:
    """Set use_cpu if there is no accelerator, and the precision: by settings, else by launcher, else the faster.

    On a CPU rank 0 measures for all ranks. A UserError if processes cannot meet, or would have to share a device.
    """
    if not torch.accelerator.is_available() or cpu_is_asked_for():
        args.use_cpu = True
    check_processes(args.use_cpu)
    if wants_deepspeed():
        build_communication()
    _choose_precision(args)
    if args.activation_checkpointing is None:  # the new name of gradient_checkpointing: TRL's is the old one
        args.activation_checkpointing = args.gradient_checkpointing


def _choose_precision(args: TrainingArguments) -> None:
    asked = "bf16" if args.bf16 else "fp16" if args.fp16 else None if args.bf16 is None else "no"
    launcher = launcher_precision()
    if asked is None and launcher is None:
        args.bf16, why = _agreed(args)
        give_reason(args, why)
    elif asked is None and launcher is not None:
        word, where = launcher
        if word == "bf16" and not args.use_cpu and not _bf16(False)[0]:
            raise UserError(f"mixed_precision: {where} asks for bf16, and this device has no bf16; use fp16 or no")
        args.bf16, args.fp16 = word == "bf16", word == "fp16"
        give_reason(args, f"{where}: {word}")
    else:
        args.bf16 = bool(args.bf16)
        _reconcile(args, str(asked), launcher)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # transformers and Accelerate read it again
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"


def _reconcile(args: TrainingArguments, asked: str, launcher: tuple[str, str] | None) -> None:
    """The settings have said which precision; say so where the launcher was asked for another one."""
    word, where = launcher or (asked, "")
    if word == asked:
        return
    if where == "DeepSpeed's config file":  # DeepSpeed would go by it
        raise UserError(
            f"{where}: its precision is {word}, but that of the settings is {asked}; set bf16.enabled and fp16.enabled "
            'there to "auto"'
        )
    if word != "no":  # what it also says where nothing is set
        give_reason(args, f"as set; {where} asks for {word}")


def _agreed(args: TrainingArguments) -> tuple[bool, str]:
    """The same on all ranks: of a CPU, what rank 0 has measured."""
    if not args.use_cpu or process_count() == 1:
        return _bf16(args.use_cpu)
    join_processes(args.ddp_timeout, args.use_cpu, args.ddp_backend)
    return from_main(lambda: _bf16(args.use_cpu))


def evaluation_precision(asked: Literal["fp32", "bf16", "auto"]) -> Precision:
    """The precision of an evaluation, and why where it was chosen here; the same on all ranks, which have joined."""
    if asked != "auto":
        return {"taken": asked, "why": None}
    launcher = launcher_precision()
    if launcher is not None:
        return {"taken": "bf16" if launcher[0] == "bf16" else "fp32", "why": f"{launcher[1]}: {launcher[0]}"}
    fast, why = from_main(lambda: _bf16(cpu_is_asked_for()))
    return {"taken": "bf16" if fast else "fp32", "why": why}


def give_reason(args: TrainingArguments, why: str) -> None:
    """Say why the settings have their precision, where it was not the user's choice."""
    vars(args)["precision_reason"] = why


def precision(args: TrainingArguments) -> Precision:
    """The settings' precision, for run.json."""
    return {
        "taken": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "why": vars(args).get("precision_reason"),
    }


def precision_line(args: TrainingArguments) -> str | None:
    """`in_words` of the settings' precision; None where the user has set it."""
    found = precision(args)
    return in_words(found) if found["why"] else None


def in_words(found: Precision) -> str:
    """E.g. "fp32 (bf16 measured: 0.6 times as fast)"; only "fp32" where the user has set it."""
    return f"{found['taken']} ({found['why']})" if found["why"] else found["taken"]
