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
        return {"rows": rows, "memory_before": 0, "memory_peak": rows * 2**20}

    monkeypatch.setattr(growth, "run_side", run)
    monkeypatch.setattr(growth, "seconds", lambda result: result["rows"] ** 2)
    said = []
    found = growth.growth("tiny", "fp32", said.append)
    assert [line.partition("]")[0] for line in said] == [f"[{i}/8" for i in range(1, 9)]
    assert said[1] == "[2/8] batch (rows) 32: 1024.00 s, 32 MiB"
    assert {given["shape"] for given in runs} == {"tiny"}
    assert found[0]["values"] == [8, 32]
    assert found[0]["exponents"] == pytest.approx({"time": 2, "memory": 1})
    assert [given["change"]["width"] for given in runs[4:6]] == [32, 128]
    assert all(given["change"]["width"] % given["change"]["heads"] == 0 for given in runs[4:6])


def test_other_shapes_are_refused():
    assert BenchmarkConfig(growth=True).shape == "seed"
    with pytest.raises(UserError, match="shape: expected seed or tiny with growth, found 'smollm2'"):
        BenchmarkConfig(growth=True, shape="smollm2")
