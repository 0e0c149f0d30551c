"""Run both sides in turn, A B A B; results as numbers and as a table."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rlhf.benchmark.work import ENDLESS, PAIRS, RESULT, SHAPES, WORKS
from rlhf.errors import UserError
from rlhf.perf.hardware import device_name, matmul_peak, memory_bandwidth

_LIMIT = 3600  # seconds of one run
PHASES = ("generate", "score", "learn", "rest", "evaluation")


def run_side(side: str, given: dict[str, Any], trl: Path | None, limit: float = _LIMIT) -> dict[str, Any]:
    """One run in a separate process, with a limit in seconds.

    trl: a folder with TRL 1.12, put first on the path for TRL's PPO.
    """
    root = str(Path(__file__).resolve().parents[2])
    first = [str(trl)] if side == "trl" and trl is not None and given["work"].startswith("ppo") else []
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*first, root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "rlhf.benchmark.worker", side, json.dumps(given)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"benchmark: expected a result of {side} within {limit:.0f} s, found none") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"benchmark: expected a result of {side} on {given['shape']}, found: {last}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
    return found


def all_counts() -> dict[str, Any]:
    """`versions`, and `counts`: those of each work of shape tiny by name, of PPO by phase. A process for each work."""
    counts: dict[str, Any] = {}
    for work in WORKS:
        # Responses of full length: how long others are depends on the last bits of a machine.
        given = {"shape": "tiny", "work": work, "precision": "fp32", "on_cpu": True}
        counts |= run_side("counts", given | {"change": {"mean_response": ENDLESS}}, None)
    versions = {"torch": version("torch").split("+")[0], "transformers": version("transformers")}
    return {"versions": versions, "counts": counts}


def compare(given: dict[str, Any], pairs: int, trl: Path | None) -> dict[str, Any]:
    """`pairs` pairs of runs, one seed each: their results, ratios and differences."""
    runs = []
    for seed in range(pairs):
        pair = {side: run_side(side, given | {"seed": seed}, trl) for side in ("rlhf", "trl")}
        check_equal(pair)
        runs.append(pair)
    return {
        "run": given,
        "pairs": runs,
        "ratio": spread([_rate(pair["rlhf"], given) / _rate(pair["trl"], given) for pair in runs]),
        "tokens_ratio": spread([_token_rate(pair["rlhf"]) / _token_rate(pair["trl"]) for pair in runs]),
        "memory_ratio": spread([pair["rlhf"]["memory_peak"] / pair["trl"]["memory_peak"] for pair in runs]),
        "machine": machine(),
    }


def check_equal(pair: dict[str, dict[str, Any]]) -> None:
    """A UserError if the two sides differ in prompt tokens, optimizer steps or counted steps."""
    for name in ("prompt_tokens", "updates", "steps"):
        one, two = (pair[side][name] for side in ("rlhf", "trl"))
        one, two = (len(x) if isinstance(x, list) else x for x in (one, two))
        if one != two:
            raise UserError(f"benchmark: expected equal {name} on both sides, found {one} and {two}")


def machine() -> dict[str, Any]:
    """The machine: device, peak rates and bandwidth."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return {
        "device": device_name(device),
        "fp32_flops": matmul_peak(device, torch.float32),
        "bf16_flops": matmul_peak(device, torch.bfloat16),
        "bandwidth": memory_bandwidth(device),
    }


def seconds(result: dict[str, Any]) -> float:
    """Mean seconds of the counted steps."""
    return statistics.mean(sum(step.values()) for step in result["steps"])


def _rate(result: dict[str, Any], given: dict[str, Any]) -> float:
    return batch(given) / seconds(result)


def batch(given: dict[str, Any]) -> int:
    """Responses, or pairs, per step."""
    return PAIRS if given["work"] == "reward" else SHAPES[given["shape"]].batch


def _token_rate(result: dict[str, Any]) -> float:
    """Prompt and response tokens of the counted steps, each counted once, per second."""
    counted = result["response_tokens"][1:]
    return (result["prompt_tokens"] + (statistics.mean(counted) if counted else 0)) / seconds(result)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def table(found: dict[str, Any]) -> str:
    """The result of `compare` as text."""
    given, lines = found["run"], []
    rows = batch(given)
    lines.append(f"{given['work']}, shape {given['shape']}, {given['precision']}, {len(found['pairs'])} pairs of runs")
    for side in ("rlhf", "trl"):
        results = [pair[side] for pair in found["pairs"]]
        whole = statistics.median(map(seconds, results))
        phases = ", ".join(f"{name} {_phase(results, name):.2f}" for name in PHASES if _phase(results, name) > 0)
        answers = [sum(result["response_tokens"][1:]) for result in results]
        peak, before = (max(r[f"memory_{when}"] for r in results) / 2**20 for when in ("peak", "before"))
        lines.append(
            f"  {side:4} {rows / whole:8.2f} episodes/s {statistics.median(map(_token_rate, results)):9.0f} tokens/s"
            f" {whole:8.2f} s per step ({phases}); memory {peak:.0f} MiB, {before:.0f} of it "
            f"before training; response tokens {answers}"
        )
    for name in ("ratio", "tokens_ratio", "memory_ratio"):
        one = found[name]
        lines.append(f"  {name:12} min {one['min']:.2f}  median {one['median']:.2f}  max {one['max']:.2f}")
    lines.append("  pair by pair: " + ", ".join(_pair(pair, given) for pair in found["pairs"]))
    last = found["pairs"][-1]["rlhf"]
    needed = (f"{name} {flops / 1e9:,.0f}" for name, flops in last.get("flops", {}).items())
    lines.append("  GFLOP needed by the last step: " + (", ".join(needed) or "not counted"))
    perf = last.get("perf", {})
    lines += [f"  {name} {value:.3g}" for name, value in sorted(perf.items()) if not name.endswith("second")]
    of = found["machine"]
    lines.append(
        f"  on {of['device']}: matrix products {of['fp32_flops'] / 1e9:.0f} GFLOP/s in fp32, "
        f"{of['bf16_flops'] / 1e9:.0f} in bf16; memory {of['bandwidth'] / 1e9:.0f} GB/s"
    )
    return "\n".join(lines)


def _pair(pair: dict[str, dict[str, Any]], given: dict[str, Any]) -> str:
    longest = pair["rlhf"].get("longest_prompt")
    ratio = _rate(pair["rlhf"], given) / _rate(pair["trl"], given)
    return f"{ratio:.2f}" + (f" (longest prompt {longest})" if longest else "")


def _phase(results: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(statistics.mean(step.get(name, 0.0) for step in result["steps"]) for result in results)
