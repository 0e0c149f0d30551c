"""What `rlhf benchmark --quick` counts, and that no work computes more than is stored."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from rlhf.benchmark import counts
from rlhf.benchmark.work import ENDLESS, read_run
from rlhf.errors import UserError

STORED = json.loads(counts.STORED.read_text(encoding="utf-8"))


def event(name, start, flops=0, bytes_=0, end=None):
    time = SimpleNamespace(start=start, end=start + 1 if end is None else end)
    return SimpleNamespace(name=name, time_range=time, flops=flops, self_cpu_memory_usage=bytes_)


def test_events_are_added_up_by_phase():
    events = [event("phase: score", 0, end=10), event("phase: learn", 20, end=30), event("cudaLaunchKernel", 3)]
    events += [event("aten::mm", 1, flops=100, bytes_=8), event("aten::embedding", 2, bytes_=4)]
    events += [event("aten::mm", 21, flops=7), event("aten::view", 22, bytes_=-4), event("aten::add", 15)]
    assert counts._by_phase(events) == {
        "score": {"operations": 2, "flops": 100, "bytes": 12, "passes": 1},
        "learn": {"operations": 2, "flops": 7, "bytes": 0, "passes": 0},
        "rest": {"operations": 1, "flops": 0, "bytes": 0, "passes": 0},
    }


def test_a_line_for_each_work_positions_where_they_are_counted():
    one = {"operations": 12345, "flops": 67.89e6, "bytes": 1.25e6, "passes": 3}
    found = counts.counts_table({"counts": {"reward": one, "ppo_full learn": one | {"positions": 1316}}})
    assert [line.split() for line in found.splitlines()[1:]] == [
        ["reward", "12,345", "67.9", "1.2", "3"],
        ["ppo_full", "learn", "12,345", "67.9", "1.2", "3", "1,316"],
    ]
    assert len({len(line) for line in found.splitlines()[::2]}) == 1


def stored(**numbers):
    return {"versions": {"torch": "2"}, "counts": {"reward": numbers}}


def test_growth_of_more_than_five_per_cent_is_named():
    before = stored(operations=1000, passes=4)
    counts.check_growth(stored(operations=1050, passes=3), before)
    with pytest.raises(UserError, match=r"reward: operations 1,000 -> 1,051; if that is meant"):
        counts.check_growth(stored(operations=1051, passes=4), before)
    with pytest.raises(UserError, match=r"evaluation: passes 0 -> 1;"):
        counts.check_growth({"versions": {"torch": "2"}, "counts": {"evaluation": {"passes": 1}}}, before)
    with pytest.raises(UserError, match=r"\(those stored are of torch 2\)"):
        counts.check_growth(stored(passes=9) | {"versions": {"torch": "3"}}, before)


@pytest.mark.parametrize("work", ["ppo_full", "ppo_lora", "reward", "evaluation"])
def test_no_work_computes_more_than_is_stored(tmp_path, work):
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    if versions != STORED["versions"]:
        pytest.skip(f"the stored counts are of {STORED['versions']}")
    given = {"shape": "tiny", "work": work, "precision": "fp32", "on_cpu": True, "change": {"mean_response": ENDLESS}}
    found = counts.counted(read_run(given), tmp_path)
    counts.check_growth({"versions": versions, "counts": found}, STORED)
    # Nor much less: then what is stored would let through what grows again.
    for name, numbers in found.items():
        for count, number in numbers.items():
            assert number >= 0.8 * STORED["counts"][name][count], (name, count)


def test_matrix_products_by_hand():
    """Of a full step of PPO: two layers of 12 x 32 x 32 weights, and the head's 512 x 32 for tokens of responses."""
    learn, score = STORED["counts"]["ppo_full learn"], STORED["counts"]["ppo_full score"]
    assert learn["positions"] == 2 * 2 * 329  # two epochs, policy and critic, and the texts' tokens
    trunk, head = 2 * 329 * 2 * 12 * 32 * 32, 2 * 8 * 16 * 512 * 32
    # Policy and critic, forward, and backward twice as much; two epochs.
    assert learn["flops"] == pytest.approx(2 * 3 * (2 * trunk + head), rel=0.1)
    # Policy, critic, reference and reward model.
    assert score["flops"] == pytest.approx(4 * trunk + 2 * head, rel=0.1)
