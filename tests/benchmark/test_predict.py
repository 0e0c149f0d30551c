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
    for value in ("true", "1e999", '"1"'):
        file.write_text(f'{{"peak_tflops": {value}, "bandwidth_gbs": 1}}')
        with pytest.raises(UserError, match=r"^peak_tflops: expected a positive number, found"):
            predict.gpu_of(str(file))
    with pytest.raises(UserError, match=r"found 'h20'; did you mean 'h200'\?$"):
        predict.gpu_of("h20")


def test_a_share_is_of_the_whole():
    assert predict.gpu_of("h100", share=1).share == 1
    with pytest.raises(UserError, match=r"^share: expected at most 1, found 1.5$"):
        predict.gpu_of("h100", share=1.5)


@pytest.mark.parametrize(("captured", "expected"), [(None, "stored"), (True, True), (False, False)])
def test_decoding_is_captured_as_asked_or_as_stored(monkeypatch, captured, expected):
    stored = predict.stored_kernels()
    for found in (True, False):
        monkeypatch.setattr(predict, "stored_kernels", lambda found=found: stored | {"decoding is captured": found})
        phases = {one.name: one.captured for one in predict.phases(work.SHAPES["tiny"], "full", captured)}
        assert phases.pop("generate, tokens") == (found if expected == "stored" else expected)
        assert not any(phases.values())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_bytes_of_a_step_by_hand(kind):
    """10 rows in passes of 4, so 3 of them; prompts of 256 tokens and responses of 16; two layers 32 wide."""
    shape = dataclasses.replace(work.SHAPES["tiny"], batch=10, micro=4)
    found = {one.name: one for one in predict.phases(shape, kind)}
    head, adapters = 512 * 32, 0 if kind == "full" else 2 * 2 * 8 * 2 * 32  # two layers, query and value, rank 8
    base = 2 * 12 * 32**2
    policy, critic = base + adapters + head, base + adapters
    frozen = base + head, base
    tokens, logits = 10 * (256 + 16), 10 * 16 * 512
    prompts = 10 * 256
    # Weights in bf16; of each token the keys and values in 2 bytes, and the states of two layers.
    assert found["generate, prompts"].bytes == policy * 2 + prompts * (2 * 2 * 32 * 2 + 2 * 32 * 70)
    # Each weight cast and used in each pass; logits of policy and reference; states of four models.
    scored = (policy + critic + sum(frozen)) * 3 * (6 + 2) + 2 * logits * 32 + 4 * tokens * 2 * 32 * 70
    assert found["score"].bytes == scored
    trained = (policy, critic) if kind == "full" else (adapters, adapters)
    learned = sum(
        3 * (weights * (6 + 2 * 2) + own * 20) + own * 40 + tokens * 2 * 32 * 210
        for weights, own in zip((policy, critic), trained, strict=True)
    )
    assert found["learn"].bytes == 2 * (learned + logits * 70)  # two epochs
    assert found["generate, tokens"].least_bytes == found["generate, tokens"].bytes > 0
    assert found["rest"].bytes == found["rest"].flops == 0


def test_kernels_of_a_step_are_those_of_its_units():
    """Of tokens 16, the first of which reads the prompts; of passes 3, of micro-batches as many an optimizer step."""
    shape = dataclasses.replace(work.SHAPES["tiny"], batch=10, micro=4)
    units = predict.stored_kernels()["works"]["full"]

    def cost(phase, unit):
        one = units[phase][unit]["kernels"]
        return one["fixed"] + 2 * one["layer"]

    found = {one.name: one.kernels for one in predict.phases(shape, "full")}
    assert found["generate, prompts"] == pytest.approx(cost("generate", "tokens") + cost("generate", "step"))
    assert found["generate, tokens"] == pytest.approx(15 * cost("generate", "tokens"))
    assert found["score"] == pytest.approx(3 * cost("score", "passes") + cost("score", "step"))
    learn = 2 * (3 * cost("learn", "micro_batches") + cost("learn", "optimizer_steps")) + cost("learn", "step")
    assert found["learn"] == pytest.approx(learn)


def test_lines_of_the_table_by_hand():
    """16 response tokens; the second phase is the one that a graph replays."""
    gpu = dataclasses.asdict(PLAIN)
    times = {"launch": 1.0, "compute": 0.5, "memory": 0.25, "waiting": 0.125, "predicted": 1.125, "floor": 0.5}
    row = {"kernels": 20, "waits": 4, "captured": False}
    rows = [
        row | times | {"name": "generate, prompts", "memory": 2.0},
        row | times | {"name": "generate, tokens", "captured": True, "kernels": 300, "waits": 3},
        row | times | {"name": "learn", "compute": 1.25},
    ]
    found = {"gpu": gpu, "versions": {"torch": "2"}, "works": {"full": rows}}
    lines = predict.prediction_table(found, work.SHAPES["tiny"], "card").splitlines()
    assert [line.split()[-1] for line in lines[3:6]] == ["memory", "launch", "compute"]
    assert lines[6].split() == ["a", "step", "340", "11", "3.375", "1.500", "2.2", "x", "the", "floor"]
    # By a host twice as fast 2 + 1 + 1.25, by one half as fast 2 + 1 + 1.5: a graph is replayed by the device.
    assert lines[7] == ("  20 kernels and 0.20 waits per token; a step 4.62 s at 5 us, 4.88 s at 15 us per launch")


def test_the_table_names_what_is_assumed():
    found = predict.predict(MEDIUM, PLAIN, captured=True)
    words = predict.prediction_table(found, MEDIUM, "card")
    rows = {"generate, prompts": 2, "generate, tokens": 2, "score": 2, "learn": 2, "a step": 2}
    assert {name: words.count(f"  {name:18}") for name in rows} == rows
    assert "50% of 1000 TFLOP/s" in words
    assert "10 us of host time per kernel, 1 us if a CUDA graph replays it" in words
    with pytest.raises(UserError, match="shape"):
        predict.phases(work.SHAPES["smollm2"], "full")
