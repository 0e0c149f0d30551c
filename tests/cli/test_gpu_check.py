"""The GPU check continues after a failure, ends in time, leaves nothing behind and reports what it found."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from limits import HANG

from rlhf.benchmark.probe import calls_by_phase
from rlhf.cli import gpu_check
from rlhf.cli.gpu_check import (
    GpuCheckConfig,
    Item,
    ItemError,
    Steps,
    child,
    make_items,
    read_tests,
    run_items,
)
from rlhf.errors import UserError

XML = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_padding" name="a"/>
<testcase classname="tests.gpu.test_padding" name="b"><failure message="1 == 2&#10;more">trace</failure></testcase>
<testcase classname="tests.gpu.test_engines" name="c"><skipped message="on a GPU only"/></testcase>
<testcase classname="tests.gpu.test_resume" name="d"><error message="no device"/></testcase>
</testsuite></testsuites>"""


def test_items_go_on_after_a_failure_and_stop_in_time():
    def fails(left):
        raise ItemError("no result")

    def breaks(left):
        return {}["missing"]

    def slow(left):
        limits.append(left)
        return {"verdict": "slower than 3 x the floor", "says": "9 s", "x": 1}

    limits, after = [], []
    items = [Item("a", 60, fails), Item("b", 60, breaks), Item("c", 7, slow), Item("d", 600, slow), Item("e", 4, slow)]
    run_items(items, 1.0, lambda: after.append(1))
    verdicts = ["failed", "failed", "slower than 3 x the floor", "slower than 3 x the floor", "left out"]
    assert [item.verdict for item in items] == verdicts
    assert [item.says for item in items] == ["no result", "KeyError: 'missing'", "9 s", "9 s", "no time left"]
    assert items[2].found == {"x": 1}
    assert limits[0] == 7
    assert 50 < limits[1] <= 60  # of the whole minute, not its own ten
    assert len(after) == 4


def test_a_process_that_takes_too_long_is_ended_with_its_children(tmp_path):
    script = f"""
import subprocess, sys, time
p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(p.pid))
print("begun", flush=True)
time.sleep(60)
"""
    start = time.monotonic()
    with pytest.raises(ItemError, match=r"took longer than its 4 s; last: begun"):
        child([sys.executable, "-c", script], 4)
    assert time.monotonic() - start < HANG
    for _ in range(100):  # what was killed is a zombie until someone has taken its exit code
        stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the grandchild lives")


def test_a_process_that_fails_says_why():
    with pytest.raises(ItemError, match=r"exit code 3; last: no such kernel"):
        child([sys.executable, "-c", "import sys; print('no such kernel'); sys.exit(3)"], 60)


def test_tests_have_a_verdict_a_file():
    found = read_tests(XML)
    assert (found["verdict"], found["says"]) == ("failed", "1 passed, 2 failed, 1 skipped")
    assert found["parts"]["padding"] == {"passed": 1, "failed": ["b: ['1 == 2']"], "skipped": {}}
    assert found["parts"]["engines"]["skipped"] == {"on a GPU only": 1}
    assert read_tests(XML.replace("failure", "skipped").replace("error", "skipped"))["verdict"] == "ok"
    with pytest.raises(ItemError, match="no test"):
        read_tests("<testsuites/>")
    none = XML.replace("</testsuite>", "").replace("</testsuites>", "").splitlines()[3]
    only = f"<a>{none}{none.replace('on a GPU only', 'two GPUs')}{none}</a>"
    found = read_tests(only)
    assert (found["verdict"], found["says"]) == ("left out", "0 passed, 0 failed, 3 skipped")
    assert found["parts"]["engines"]["skipped"] == {"on a GPU only": 2, "two GPUs": 1}


def result(learn, **changes):
    found = {"prompt_tokens": 1, "updates": 4, "response_tokens": [5, 6], "memory_peak": 2**30}
    return found | {"steps": [{"generate": 1.0, "learn": learn}], "floors": {"generate": 0.5, "learn": 0.5}} | changes


def test_pairs_are_runs_in_turn_and_their_medians(monkeypatch):
    calls, times = [], {"rlhf": [1.0, 3.0], "trl": [9.0, 7.0]}

    def side(name, given, trl, limit):
        calls.append((name, given["seed"], trl))
        return result(times[name][given["seed"]])

    monkeypatch.setattr(gpu_check, "run_side", side)
    steps = Steps({"shape": "tiny"}, Path("trl"), slower=2.5)
    assert steps.pair(60)["verdict"] == "ok"  # 2 s at a floor of 1 s
    found = steps.pair(60)
    assert calls == [("rlhf", 0, None), ("trl", 0, Path("trl")), ("rlhf", 1, None), ("trl", 1, Path("trl"))]
    assert found["step"] == {"rlhf": 3.0, "trl": 9.0}
    assert found["says"] == "3.00 s per step, 3.0 x the floor of 1 s; TRL 1.12 9.00 s, 3.00 times as long"
    assert found["verdict"] == "slower than 2.5 x the floor"
    assert found["share of the limit"] == {"generate": 0.5, "learn": 0.25}


def test_a_step_counts_without_trl(monkeypatch):
    def side(name, given, trl, limit):
        if name == "trl":
            raise UserError("benchmark: out of memory")
        return result(1.0)

    monkeypatch.setattr(gpu_check, "run_side", side)
    found = Steps({"shape": "tiny"}, Path("trl"), 3).pair(60)
    assert (found["verdict"], found["without TRL"]) == ("ok", "benchmark: out of memory")


def test_calls_are_counted_by_phase():
    events = [
        ("phase: learn", 10, 20), ("cudaLaunchKernel", 11, 12), ("cudaLaunchKernelExC", 12, 13), ("aten::mm", 11, 13),
        ("cudaStreamSynchronize", 19, 30), ("cudaLaunchKernel", 25, 26), ("cudaMemcpyAsync", 15, 16), ("other", 15, 16),
    ]  # fmt: skip
    assert calls_by_phase(events, cuda=True) == {
        "learn": {"cudaMemcpyAsync": 1, "launches": 2, "waits": 1},
        "rest": {"launches": 1},
    }
    assert calls_by_phase(events, cuda=False) == {"learn": {"operations": 1}, "rest": {}}


def test_what_matters_most_comes_first_and_only_chooses(tmp_path):
    names = [item.name for item in make_items(GpuCheckConfig(), tmp_path)]
    assert names[:4] == [
        "device and libraries",
        "tests on the device",
        "gpt2-medium step, full",
        "gpt2-medium step, lora",
    ]
    quick = GpuCheckConfig(device="cpu", quick=True, only="profile")
    assert [item.name for item in make_items(quick, tmp_path)] == ["profile of a tiny step, full"]
    with pytest.raises(UserError, match=r"only: '.*' is part of no item's name; items: device and libraries"):
        make_items(GpuCheckConfig(only="nothing"), tmp_path)


def test_a_page_shows_texts_as_they_are():
    item = Item("x | y", 1, lambda left: {}, "failed", "line\n<b>two</b>", 2.0, {"seconds": {"a": {"b": 0.5}}})
    text = gpu_check.page([item], GpuCheckConfig())
    assert "\n    <b>two</b>\n" in text
    assert "| `a` | `0.5` |" in text
    assert "x \\| y" in text


@pytest.mark.slow
def test_from_end_to_end_on_a_cpu(tmp_path, monkeypatch):
    """The profile of one tiny step; .ci/run has all items, and the command."""
    argv = ["gpu_check", "--device", "cpu", "--quick", "--only", "profile", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    gpu_check.main()
    (item,) = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["items"]
    assert item["verdict"] == "ok"
    assert {"generate", "score", "learn", "rest"} == set(item["found"]["calls"])
    assert item["found"]["calls"]["learn"]["operations"] > 1000
    assert "aten::addmm" in (tmp_path / "out" / "gpu_check.md").read_text()


def test_a_gpu_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--output", str(tmp_path / "out")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device: PyTorch sees no GPU"):
        gpu_check.main()
    assert not (tmp_path / "out").exists()


def test_a_step_at_the_limit_is_not_slow_and_the_largest_memory_counts(monkeypatch):
    peaks = iter([3 * 2**30, 2**30])
    monkeypatch.setattr(gpu_check, "run_side", lambda *given: result(2.0, memory_peak=next(peaks)))
    steps = Steps({"shape": "tiny"}, None, slower=3.0)
    assert steps.pair(60)["verdict"] == "ok"  # 3 s at a floor of 1 s
    found = steps.pair(60)
    assert found["memory (GiB)"] == {"rlhf": 3.0}
    assert found["without TRL"] == "TRL 1.12 is not here"
    assert found["response tokens"] == {"rlhf": [[5, 6], [5, 6]]}
    assert found["seconds"] == {"rlhf": {"generate": 1.0, "learn": 2.0}, "floor": {"generate": 0.5, "learn": 0.5}}


def test_times_of_the_two_sides_are_compared_the_right_way_round(monkeypatch):
    monkeypatch.setattr(gpu_check, "run_side", lambda name, *given: result({"rlhf": 1.0, "trl": 4.0}[name]))
    found = Steps({"shape": "tiny"}, Path("trl"), slower=3.0).pair(60)
    assert found["says"] == "2.00 s per step, 2.0 x the floor of 1 s; TRL 1.12 5.00 s, 2.50 times as long"
