"""A predicted step is what its counts say, and the counts are those of the code."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import tiny
from limits import HANG

from rlhf.benchmark import predict, work
from rlhf.errors import UserError

MEDIUM = work.SHAPES["gpt2-medium"]
PLAIN = predict.GPU(peak_tflops=1000, bandwidth_gbs=4000, share=0.5, launch_us=10, captured_us=1, wait_us=100)


@pytest.mark.slow
def test_stored_kernels_are_those_of_the_code():
    """Of a step of sizes that the file was not made from. Where this fails, write the file anew and look at the change:
    python tests/cuda/count_kernels.py --write
    """
    command = [sys.executable, str(tiny.ROOT / "tests" / "cuda" / "count_kernels.py"), "--check"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False, cwd=tiny.ROOT, env=env)
    assert (done.returncode, done.stdout.strip().splitlines()[-1:]) == (0, ["as stored"]), done.stdout + done.stderr


def test_counts_are_sums_over_units_and_layers():
    one = {"fixed": 2.0, "layer": 3.0}
    given = {"learn": {unit: {"kernels": one, "waits": one} for unit in predict.UNITS["learn"]}}
    sizes = predict.Sizes(layers=10, tokens=99, passes=99, micro_batches=4, optimizer_steps=3)
    # 12 micro-batches, 3 optimizer steps, 1 step, 32 of each.
    assert predict.counted(given, sizes)["learn"] == {"kernels": 16 * 32, "waits": 16 * 32}


@pytest.mark.parametrize(
    ("phase", "seconds"),
    [
        (predict.Phase("launches", kernels=1000, waits=0, flops=1e12, bytes=4e9), (0.010, 0.001)),
        (predict.Phase("products", kernels=100, waits=0, flops=10e12, bytes=4e9), (0.020, 0.010)),
        (predict.Phase("memory", kernels=100, waits=3, flops=1e12, bytes=40e9), (0.0103, 0.001)),
        (predict.Phase("tokens", kernels=1000, waits=0, flops=1e12, bytes=8e9, least_bytes=6e9), (0.010, 0.0015)),
        (predict.Phase("graph", kernels=1000, waits=0, flops=0, bytes=2e9, captured=True), (0.001, 0)),
    ],
    ids=lambda x: x.name if isinstance(x, predict.Phase) else "",
)
def test_the_longest_counts_and_waits_come_on_top(phase, seconds):
    found = phase.seconds(PLAIN)
    assert (found["predicted"], found["floor"]) == pytest.approx(seconds)


def test_gpt2_medium_is_that_of_the_floors_by_hand():
    """docs/performance-gpu.md has the sums: TFLOP, and bytes of decoding."""
    full, lora = ({one.name: one for one in predict.phases(MEDIUM, kind)} for kind in ("full", "lora"))
    # 24 blocks of 12 x 1024^2 weights; 50,257 x 1024 of the head; half of the square of attention, two products.
    trunk, head, square = 24 * 12 * 1024**2, 50257 * 1024, 2 * 24 * 1024
    tokens, answers, texts = 64 * 384, 64 * 128, 64 * 384**2
    forward = 2 * trunk * tokens + square * texts
    assert full["score"].flops == pytest.approx(4 * forward + 2 * 2 * head * answers)
    assert full["learn"].flops == pytest.approx(4 * 3 * (2 * forward + 2 * head * answers))
    assert full["generate, tokens"].bytes == pytest.approx(
        127 * 2 * (trunk + head) + 2 * 2 * 24 * 1024 * 64 * sum(256 + i for i in range(1, 128))
    )
    # Two thirds and the adapters: 24 layers, query and value, rank 8, both matrices, in policy and critic.
    adapters = 24 * 2 * 8 * 2 * 1024
    expected = 4 * (
        2 * (2 * 2 * trunk * tokens + 3 * square * texts + 3 * 2 * adapters * tokens) + 2 * 2 * head * answers
    )
    assert lora["learn"].flops == pytest.approx(expected)
    assert full["learn"].flops / 1e12 == pytest.approx(377, abs=1)
    assert lora["learn"].flops / 1e12 == pytest.approx(256, abs=1)


def test_a_kernel_more_a_token_shows(monkeypatch):
    stored = predict.stored_kernels()
    before = predict.predict(MEDIUM, PLAIN, captured=False)["works"]["full"]
    stored["works"]["full"]["generate"]["tokens"]["kernels"]["layer"] += 1
    monkeypatch.setattr(predict, "stored_kernels", lambda: stored)
    after = predict.predict(MEDIUM, PLAIN, captured=False)["works"]["full"]
    more = [b["predicted"] - a["predicted"] for a, b in zip(before, after, strict=True)]
    assert more[1] == pytest.approx(127 * 24 * PLAIN.launch_us / 1e6)
    assert more[2:] == [0, 0, 0]


def test_figures_of_a_gpu_of_ones_own(tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"peak_tflops": 100, "bandwidth_gbs": 500}))
    own = predict.gpu_of(str(file), launch_us=4)
    assert own == dataclasses.replace(predict.GPUS["h100"], peak_tflops=100, bandwidth_gbs=500, launch_us=4)
    for text in ("[]", '{"peak_tflops": 1}', '{"peak_tflops": 1, "bandwidth_gbs": 1, "speed": 2}', "no"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"^predict: expected"):
            predict.gpu_of(str(file))
    with pytest.raises(UserError, match=r"^predict: expected one of h100, h200, a100, or a JSON file"):
        predict.gpu_of("h1000")
    with pytest.raises(UserError, match=r"^bandwidth_gbs: expected a positive number, found 0"):
        predict.gpu_of("h100", bandwidth_gbs=0)


def test_the_table_names_what_is_assumed():
    found = predict.predict(MEDIUM, PLAIN, captured=True)
    words = predict.prediction_table(found, MEDIUM, "card")
    rows = {"generate, prompts": 2, "generate, tokens": 2, "score": 2, "learn": 2, "a step": 2}
    assert {name: words.count(f"  {name:18}") for name in rows} == rows
    assert "50% of 1000 TFLOP/s" in words
    assert "10 us of host time per kernel, 1 us if a CUDA graph replays it" in words
    with pytest.raises(UserError, match="shape"):
        predict.phases(work.SHAPES["smollm2"], "full")
