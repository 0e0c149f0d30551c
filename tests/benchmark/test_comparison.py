"""What is made of the results of both sides: which process runs, ratios, and the table, by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.benchmark import compare as module
from rlhf.benchmark.compare import batch, compare, run_side, seconds, table
from rlhf.benchmark.work import ENDLESS, RESULT
from rlhf.errors import UserError

MIB = 2**20


@pytest.fixture
def ran(monkeypatch):
    """The calls of subprocess.run, which prints two results, of which the last one counts."""
    calls, done = [], SimpleNamespace(stdout=f"{RESULT}1\nso far\n{RESULT}" + '{"a": 2}\n', stderr="", returncode=0)

    def run(command, **options):
        calls.append((command, options))
        return done

    monkeypatch.setattr(module.subprocess, "run", run)
    return calls, done


def test_a_side_runs_in_a_process_that_finds_this_package(ran, monkeypatch):
    calls, _ = ran
    monkeypatch.setenv("PYTHONPATH", "mine")
    root = str(Path(module.__file__).parents[2])
    given = {"shape": "tiny", "work": "ppo_lora"}
    old = Path("old")
    paths = [
        ("trl", given, old, ["old", root, "mine"]),  # before all others: another TRL is installed
        ("rlhf", given, old, [root, "mine"]),
        ("trl", given, None, [root, "mine"]),
        ("trl", given | {"work": "reward"}, old, [root, "mine"]),
    ]
    for side, what, trl, expected in paths:
        assert run_side(side, what, trl, limit=7) == {"a": 2}
        command, options = calls.pop()
        assert command == [sys.executable, "-m", "rlhf.benchmark.worker", side, json.dumps(what)]
        assert options["env"]["PYTHONPATH"].split(os.pathsep) == expected
        assert options["timeout"] == 7


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"returncode": 1, "stderr": "at the start\n\nwhat was wrong\n"}, "what was wrong"),
        ({"returncode": 1}, "no output"),
        ({"stdout": f"not {RESULT}\n", "stderr": "x"}, "x"),
    ],
)
def test_a_side_without_a_result_says_its_last_line(ran, changes, found):
    vars(ran[1]).update(changes)
    with pytest.raises(UserError, match=f"^benchmark: expected a result of trl on tiny, found: {found}$"):
        run_side("trl", {"shape": "tiny", "work": "reward"}, None)


def test_a_side_that_takes_too_long_is_ended(monkeypatch):
    def run(*_, timeout, **__):
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(module.subprocess, "run", run)
    with pytest.raises(UserError, match=r"^benchmark: expected a result of trl within 90 s, found none$"):
        run_side("trl", {"shape": "tiny", "work": "reward"}, None, limit=90)


def test_all_works_are_counted_with_responses_of_full_length(monkeypatch):
    asked = []

    def side(name, given, trl):
        asked.append((name, given, trl))
        return {given["work"]: {"operations": len(asked)}}

    monkeypatch.setattr(module, "run_side", side)
    found = module.all_counts()
    works = ["ppo_full", "ppo_lora", "reward", "evaluation"]
    assert found["counts"] == {work: {"operations": i} for i, work in enumerate(works, 1)}
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    rest = {"shape": "tiny", "precision": "fp32", "on_cpu": True, "change": {"mean_response": ENDLESS}}
    assert asked == [("counts", rest | {"work": work}, None) for work in works]


def result(learn, **changes):
    """Of a run with two counted steps; the first batch of responses is of the step that warms up."""
    one = {
        "steps": [{"generate": 1.0, "learn": learn}, {"generate": 3.0, "learn": learn}],
        "prompt_tokens": 100,
        "response_tokens": [999, 10, 30],
        "updates": 4,
        "memory_before": 10 * MIB,
        "memory_peak": 40 * MIB,
    }
    return one | changes


RUN = {"shape": "tiny", "work": "ppo_full", "precision": "fp32", "steps": 3}
MACHINE = {"device": "abacus", "fp32_flops": 2e9, "bf16_flops": 3e9, "bandwidth": 60e9}


def test_seconds_and_rows_of_a_step():
    assert seconds(result(2.0, steps=[{"a": 1.0, "b": 2.0}, {"a": 3.0}, {"a": 9.0}])) == 5.0  # the mean, not the median
    assert [batch(RUN | {"work": work, "shape": "seed"}) for work in ("ppo_lora", "evaluation", "reward")] == [
        64,
        64,
        8,
    ]


def compared(monkeypatch):
    """Two pairs: of 8 rows, in 4 against 8 seconds, and 4 against 6; each run had its own seed."""
    learn = {("rlhf", 0): 2.0, ("trl", 0): 6.0, ("rlhf", 1): 2.0, ("trl", 1): 4.0}
    more = {
        ("rlhf", 0): {"longest_prompt": 21, "flops": {"learn": 1e9}},
        ("trl", 0): {"memory_peak": 80 * MIB, "memory_before": 11 * MIB},
        ("rlhf", 1): {
            "memory_peak": 60 * MIB,
            "flops": {"score": 2e9, "learn": 3500e9},
            "perf": {"perf/learn/limit": 0.25, "perf/learn/tokens_per_second": 77.0, "perf/learn/padding": 3.0},
        },
        ("trl", 1): {"response_tokens": [999, 20, 30]},
    }
    asked = []

    def side(name, given, trl):
        asked.append((name, given, trl))
        return result(learn[name, given["seed"]], **more[name, given["seed"]])

    monkeypatch.setattr(module, "run_side", side)
    monkeypatch.setattr(module, "machine", lambda: MACHINE)
    found = compare(RUN, 2, Path("old"))
    assert asked == [(name, RUN | {"seed": i}, Path("old")) for i in range(2) for name in ("rlhf", "trl")]
    return found


def test_ratios_by_hand(monkeypatch):
    found = compared(monkeypatch)
    assert (found["run"], found["machine"]) == (RUN, MACHINE)
    assert found["ratio"] == {"min": 1.5, "median": 1.75, "max": 2.0}
    # 100 + 20 tokens in 4 seconds against as many in 8; and against 125 in 6.
    assert found["tokens_ratio"] == pytest.approx({"min": 1.44, "median": 1.72, "max": 2.0})
    assert found["memory_ratio"] == {"min": 0.5, "median": 1.0, "max": 1.5}


def test_sides_that_did_other_work_are_not_compared(monkeypatch):
    monkeypatch.setattr(module, "run_side", lambda side, given, trl: result(2.0, updates=4 if side == "rlhf" else 8))
    with pytest.raises(UserError, match=r"^benchmark: expected equal updates on both sides, found 4 and 8$"):
        compare(RUN, 1, None)


def test_the_table_by_hand(monkeypatch):
    assert table(compared(monkeypatch)).splitlines() == [
        "ppo_full, shape tiny, fp32, 2 pairs of runs",
        "  rlhf     2.00 episodes/s        30 tokens/s     4.00 s per step (generate 2.00, learn 2.00); memory 60 MiB, "
        "10 of it before training; response tokens [40, 40]",
        "  trl      1.14 episodes/s        18 tokens/s     7.00 s per step (generate 2.00, learn 5.00); memory 80 MiB, "
        "11 of it before training; response tokens [40, 50]",
        "  ratio        min 1.50  median 1.75  max 2.00",
        "  tokens_ratio min 1.44  median 1.72  max 2.00",
        "  memory_ratio min 0.50  median 1.00  max 1.50",
        "  pair by pair: 2.00 (longest prompt 21), 1.50",
        "  GFLOP needed by the last step: score 2, learn 3,500",
        "  perf/learn/limit 0.25",
        "  perf/learn/padding 3",
        "  on abacus: matrix products 2 GFLOP/s in fp32, 3 in bf16; memory 60 GB/s",
    ]


def test_a_machine_is_measured_in_both_precisions(monkeypatch):
    monkeypatch.setattr(module, "matmul_peak", lambda device, dtype: {torch.float32: 1.0, torch.bfloat16: 2.0}[dtype])
    monkeypatch.setattr(module, "memory_bandwidth", lambda device: 3.0)
    found = module.machine()
    assert [found[name] for name in ("fp32_flops", "bf16_flops", "bandwidth")] == [1.0, 2.0, 3.0]
