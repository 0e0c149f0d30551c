"""In words: where a run's time went, how near to this machine's limits, and which option would save most of it.

The savings are estimates from the time each phase takes, at the speed that it has now.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlhf.config import PPOConfig
from rlhf.perf.hardware import matmul_peak
from rlhf.perf.work import Meter, Work

_WORTH = 0.05  # share of the time; less is not worth a word
_MUCH_PADDING = 15  # per cent
_LAUNCH_BOUND = 0.25  # of the limit: below it a GPU mostly waits for its next kernel
_BUSY = 0.1  # of the limit: below it a phase is mostly something else than arithmetic
_FAST = 1.5  # times the matrix products of now


@dataclass(frozen=True)
class Conditions:
    """What a rule may look at beside the phases."""

    args: PPOConfig
    gpu: bool
    lora: bool
    bf16: float  # matrix products in bf16, times as fast as those of now; 1 where they are in 16 bits


def conditions(args: PPOConfig, meter: Meter) -> Conditions:
    """Of a run; where it computes in 32 bits, bf16 is measured."""
    device, dtype = meter.device, meter.dtype
    gain = matmul_peak(device, torch.bfloat16) / meter.peak if dtype.itemsize > 2 else 1.0
    known = math.isfinite(gain)  # there may have been no memory to measure it
    return Conditions(args, device.type != "cpu", meter.policy.frozen > 0, gain if known else 1.0)


def report(work: dict[str, Work], now: Conditions) -> list[str]:
    """One line on the phases; then the best option that leaves what is learned as it is, and the best that does not."""
    whole = max(sum(one.seconds for one in work.values()), 1e-9)
    phases = sorted(work, key=lambda name: -work[name].seconds)
    parts = [_phase(name, work[name], work[name].seconds / whole) for name in phases]
    lines = [f"speed: {'; '.join(parts)}"]
    for rules, start in ((_SAME, "faster, same result"), (_OTHER, "faster, other result")):
        saved, words = max((rule(work, whole, now) for rule in rules), key=lambda found: found[0])
        if saved >= _WORTH:
            lines.append(f"{start}: {words}, about {saved:.0%} of the time")
    return lines


def _phase(name: str, one: Work, share: float) -> str:
    of = "what memory and matrix products allow" if name == "generate" else "this machine's matrix-product peak"
    return f"{name} takes {share:.0%} of the time, at {one.utilisation:.0%} of {of}, {one.padding:.0f}% padding"


Rule = Callable[[dict[str, Work], float, Conditions], tuple[float, str]]  # share of the time saved, and by what


def _seconds(work: dict[str, Work], phase: str) -> float:
    return work[phase].seconds if phase in work else 0.0


def _padding(work: dict[str, Work], whole: float, now: Conditions) -> tuple[float, str]:
    much = [work[name] for name in ("score", "learn") if name in work and work[name].padding > _MUCH_PADDING]
    saved = sum(one.seconds * one.padding / 100 for one in much) / whole
    return (
        saved if now.args.micro_batch_tokens is None else 0,
        "micro_batch_tokens, which packs rows of like length up to so many",
    )


def _checkpointing(work: dict[str, Work], whole: float, now: Conditions) -> tuple[float, str]:
    # A forward pass of the four that forward, backward and recomputation come to; three where weights are frozen.
    saved = _seconds(work, "learn") / (3 if now.lora else 4) / whole
    words = "gradient_checkpointing: false, if memory allows"
    return saved if now.args.gradient_checkpointing else 0, words


def _bf16(work: dict[str, Work], whole: float, now: Conditions) -> tuple[float, str]:
    if now.bf16 < _FAST:
        return 0, ""
    busy = sum(work[name].seconds for name in ("score", "learn") if name in work and work[name].utilisation > _BUSY)
    saved = busy * (1 - 1 / now.bf16) / whole
    return saved, f"bf16: true, whose matrix products are {now.bf16:.1f} times as fast here"


def _batch(work: dict[str, Work], whole: float, now: Conditions) -> tuple[float, str]:
    generate = work.get("generate")
    if generate is None or not now.gpu or generate.utilisation > _LAUNCH_BOUND:
        return 0, ""
    words = (
        "twice the global_batch_size (or gradient_accumulation_steps), since sampling twice the responses takes "
        "little longer"
    )
    return generate.seconds / 2 / whole, words


def _shared(work: dict[str, Work], whole: float, now: Conditions) -> tuple[float, str]:
    # The critic is one of two models in learn; in score of four, or of three and a function.
    saved = (_seconds(work, "learn") / 2 + _seconds(work, "score") / 4) / whole
    return saved if now.args.critic == "separate" else 0, "critic: shared, a head on the policy's trunk"


def _epochs(work: dict[str, Work], whole: float, now: Conditions) -> tuple[float, str]:
    epochs = now.args.num_ppo_epochs
    fewer = max(1, epochs // 2)
    words = f"num_ppo_epochs: {fewer}, which learns less from each response"
    return _seconds(work, "learn") * (1 - fewer / epochs) / whole, words


def _lora(work: dict[str, Work], whole: float, now: Conditions) -> tuple[float, str]:
    saved = _seconds(work, "learn") / 3 / whole  # no gradient of the frozen weights
    return 0 if now.lora else saved, "LoRA (peft_config; use_peft: true), which has no gradients of the base"


_SAME: tuple[Rule, ...] = (_padding, _checkpointing, _bf16)
_OTHER: tuple[Rule, ...] = (_batch, _shared, _epochs, _lora)
