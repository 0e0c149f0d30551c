"""How the benchmark of growth goes about it: every run is said, and the sizes are those of the shape."""

import pytest

from rlhf.benchmark import growth
from rlhf.config import BenchmarkConfig
from rlhf.errors import UserError


def test_every_run_is_said_and_sizes_are_the_shapes(monkeypatch):
    runs = []

    def run(side, given, trl):
        runs.append(given)
        rows = given["change"].get("batch", 16)
        return {"rows": rows, "memory_before": 5 * 2**20, "memory_peak": (rows + 5) * 2**20}

    monkeypatch.setattr(growth, "run_side", run)
    monkeypatch.setattr(growth, "seconds", lambda result: result["rows"] ** 2)
    said = []
    found = growth.growth("tiny", "fp32", said.append)
    assert [line.partition("]")[0] for line in said] == [f"[{i}/8" for i in range(1, 9)]
    assert said[1] == "[2/8] batch (rows) 32: 1024.00 s, 32 MiB"
    assert {given["shape"] for given in runs} == {"tiny"}
    assert {(given["precision"], given["steps"]) for given in runs} == {("fp32", 3)}  # the first step warms up
    assert [given["work"] for given in runs] == ["ppo_full"] * 6 + ["ppo_lora"] * 2
    assert found[0]["values"] == [8, 32]
    assert found[0]["exponents"] == pytest.approx({"time": 2, "memory": 1})
    assert [given["change"]["width"] for given in runs[4:6]] == [32, 128]
    assert all(given["change"]["width"] % given["change"]["heads"] == 0 for given in runs[4:6])


def test_each_series_changes_one_size():
    found = growth.series_of(growth.Sizes((8, 32), (16, 64), (32, 128), (1, 16), head=16))
    base = {"batch": 16, "micro": 16, "n_ppo_epochs": 1}
    assert found == {
        "batch (rows)": ("ppo_full", [(n, {"change": base | {"batch": n, "micro": 8}}) for n in (8, 32)]),
        "response (most tokens)": (
            "ppo_full",
            [
                (16, {"change": base | {"response": 16, "mean_response": 8, "positions": 2048}}),
                (64, {"change": base | {"response": 64, "mean_response": 32, "positions": 2048}}),
            ],
        ),
        "width of the model": (
            "ppo_full",
            [(32, {"change": base | {"width": 32, "heads": 2}}), (128, {"change": base | {"width": 128, "heads": 8}})],
        ),
        "LoRA rank": ("ppo_lora", [(1, {"change": base, "rank": 1}), (16, {"change": base, "rank": 16})]),
    }


def test_other_shapes_are_refused():
    assert BenchmarkConfig(growth=True).shape == "seed"
    with pytest.raises(UserError, match="shape: expected seed or tiny with growth, found 'smollm2'"):
        BenchmarkConfig(growth=True, shape="smollm2")
