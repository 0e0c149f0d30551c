"""What steps compute, in counts that no machine's speed changes, against those stored: rlhf benchmark --quick true."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from rlhf.benchmark import others, ppo
from rlhf.benchmark.probe import MarkedTrainer, SecondStep, phases
from rlhf.benchmark.work import Run
from rlhf.errors import UserError

STORED = Path(__file__).with_name("counts.json")
MOST_GROWTH = 0.05

# Of a work, or a phase of one: operations of PyTorch, FLOPs of matrix products, bytes that were allocated, passes of a
# model's trunk, and of PPO the token positions that were computed, padding included.
Counts = dict[str, float]


def counted(run: Run, folder: str) -> dict[str, Counts]:
    """What `run` computes, by name; of PPO its second step, by phase."""
    profiler = profile(activities=[ProfilerActivity.CPU], with_flops=True, profile_memory=True)
    if not run.work.startswith("ppo"):
        with profiler:
            (others.reward if run.work == "reward" else others.evaluation)(run, folder, True)
        return {run.work: _by_phase(profiler.events() or [])["rest"]}
    computed = ppo.rlhf(run, folder, MarkedTrainer, [SecondStep(profiler)])["computed"]
    found = _by_phase(profiler.events() or [])
    return {f"{run.work} {phase}": found[phase] | {"positions": positions} for phase, positions in computed.items()}


def _by_phase(events: Sequence[Any]) -> dict[str, Counts]:
    """The profiler's events -> counts by phase."""
    found: defaultdict[str, Counts] = defaultdict(lambda: {"operations": 0, "flops": 0, "bytes": 0, "passes": 0})
    spans = [(event.name, event.time_range.start, event.time_range.end) for event in events]
    for event, phase in zip(events, phases(spans), strict=True):
        if event.name.startswith("aten::"):
            one = found[phase]
            one["operations"] += 1
            one["flops"] += event.flops or 0
            one["bytes"] += max(event.self_cpu_memory_usage, 0)
            one["passes"] += event.name == "aten::embedding"
    return dict(found)


def check_growth(found: dict[str, Any], stored: dict[str, Any] | None = None) -> None:
    """A UserError that names the counts that are larger than those stored by MOST_GROWTH or more."""
    stored = stored or json.loads(STORED.read_text(encoding="utf-8"))
    grown = []
    for work, counts in found["counts"].items():
        for name, count in counts.items():
            before = stored["counts"].get(work, {}).get(name, 0)
            if count > before * (1 + MOST_GROWTH):
                grown.append(f"{work}: {name} {before:,.0f} -> {count:,.0f}")
    if grown:
        versions = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
        because = "" if found["versions"] == stored["versions"] else f" (those stored are of {versions})"
        raise UserError(
            f"counts: grown by {MOST_GROWTH:.0%} or more{because}: {'; '.join(grown)}; if that is meant, "
            f"store them: rlhf benchmark --quick true --output rlhf/benchmark/{STORED.name}"
        )


def counts_table(found: dict[str, Any]) -> str:
    """One line per work or phase."""
    lines = [f"{'':20}{'operations':>12}{'MFLOP':>10}{'MB allocated':>14}{'passes':>8}{'positions':>11}"]
    for work, one in found["counts"].items():
        positions = f"{one['positions']:11,.0f}" if "positions" in one else ""
        lines.append(
            f"{work:20}{one['operations']:12,.0f}{one['flops'] / 1e6:10,.1f}{one['bytes'] / 1e6:14,.1f}"
            f"{one['passes']:8,.0f}{positions}"
        )
    return "\n".join(lines)
