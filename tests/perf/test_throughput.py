"""The words at the end of a run, each rule by a case made for it."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_rollout import config
from tiny_ppo import trainer

from rlhf.perf import throughput
from rlhf.perf.throughput import Conditions, conditions, report
from rlhf.perf.work import Work


def phase(seconds, limit=0.5, padding=0.0):
    return Work(tokens=1, real=100 - padding, computed=100, ideal_seconds=limit * seconds, seconds=seconds)


def phases(generate=2.0, score=1.0, learn=7.0, **learning):
    return {"generate": phase(generate), "score": phase(score), "learn": phase(learn, **learning)}


def now(gpu=False, lora=True, bf16=1.0, **options):
    """Conditions under which no rule has anything to say, but for what is asked for."""
    settings = {"gradient_checkpointing": False, "critic": "shared", "num_ppo_epochs": 1}
    return Conditions(config(**settings | options), gpu, lora, bf16)


def test_one_line_says_where_the_time_went():
    work = {
        "generate": phase(2.0, limit=0.123, padding=3),
        "score": phase(1.0, limit=0.38, padding=0),
        "learn": phase(7.0, limit=0.41, padding=9),
    }
    assert report(work, now()) == [
        "speed: learn takes 70% of the time, at 41% of this machine's matrix-product peak, 9% padding; "
        "generate takes 20% of the time, at 12% of what memory and matrix products allow, 3% padding; "
        "score takes 10% of the time, at 38% of this machine's matrix-product peak, 0% padding"
    ]


SAME, OTHER = "faster, same result: ", "faster, other result: "


@pytest.mark.parametrize(
    ("work", "conditions", "said"),
    [
        # 20% of 7 of 10 seconds.
        (phases(padding=20), now(), f"{SAME}micro_batch_tokens, which packs rows of like length up to so many, 14"),
        # A quarter of 7, a third of it where weights are frozen.
        (
            phases(),
            now(gradient_checkpointing=True, lora=False),
            f"{SAME}gradient_checkpointing: false, if memory allows, 18",
        ),
        (phases(), now(gradient_checkpointing=True), f"{SAME}gradient_checkpointing: false, if memory allows, 23"),
        # Three quarters of 7 + 1.
        (phases(), now(bf16=4.0), f"{SAME}bf16: true, whose matrix products are 4.0 times as fast here, 60"),
        # Half of 6 of 10 seconds.
        (
            phases(6.0, 1.0, 3.0) | {"generate": phase(6.0, limit=0.1)},
            now(gpu=True),
            f"{OTHER}twice the global_batch_size (or gradient_accumulation_steps), since sampling twice the responses "
            "takes little longer, 30",
        ),
        # Half of 7 and a quarter of 1.
        (phases(), now(critic="separate"), f"{OTHER}critic: shared, a head on the policy's trunk, 38"),
        # Two of 5 passes are left: 7 x 3 / 5.
        (
            phases(),
            now(num_ppo_epochs=5),
            f"{OTHER}num_ppo_epochs: 2, which learns less from each response, 42",
        ),
        # A third of 7.
        (
            phases(),
            now(lora=False),
            f"{OTHER}LoRA (peft_config; use_peft: true), which has no gradients of the base, 23",
        ),
        # A quarter of 4 of 10 seconds, of scoring.
        (
            phases(2.0, 4.0, 4.0) | {"score": phase(4.0, padding=25)},
            now(),
            f"{SAME}micro_batch_tokens, which packs rows of like length up to so many, 10",
        ),
    ],
    ids=[
        "padding",
        "checkpointing",
        "checkpointing lora",
        "bf16",
        "launch-bound",
        "shared",
        "epochs",
        "lora",
        "padding in score",
    ],
)
def test_the_option_that_helps(work, conditions, said):
    words, _, per_cent = said.rpartition(", ")
    assert f"{words}, about {per_cent}% of the time" in report(work, conditions)[1:]


@pytest.mark.parametrize(
    ("work", "conditions"),
    [
        (phases(padding=14), now()),
        (phases(padding=20), now(micro_batch_tokens=64)),
        (phases(padding=20, learn=0.7), now(critic="shared")),  # 0.14 of 3.7 seconds
        (phases(), now(bf16=1.4)),
        ({"learn": phase(9.0, limit=0.05)}, now(bf16=4.0)),  # something else takes the time
        (phases(6.0, 1.0, 3.0) | {"generate": phase(6.0, limit=0.1)}, now(gpu=False)),
        (phases(6.0, 1.0, 3.0) | {"generate": phase(6.0, limit=0.3)}, now(gpu=True)),
        ({"score": phase(1.0), "learn": phase(2.0)}, now(gpu=True)),  # responses from outside
    ],
)
def test_what_would_not_help_is_not_said(work, conditions):
    assert len(report(work, conditions)) == 1


def test_the_best_of_each_kind_is_said_and_no_more():
    lines = report(
        phases(padding=50), now(gradient_checkpointing=True, critic="separate", num_ppo_epochs=4, lora=False)
    )
    assert [line.partition(",")[0] for line in lines] == [
        "speed: learn takes 70% of the time",
        "faster",
        "faster",
    ]
    assert "micro_batch_tokens" in lines[1]  # 35% against 18%
    assert "critic: shared" in lines[2]  # 38% against 35% of half the epochs and 23% of LoRA


def test_training_ends_with_these_words(tmp_path, capsys):
    run = trainer(tmp_path, max_steps=3, disable_tqdm=False)
    assert run.throughput() == []
    run.train()
    printed = capsys.readouterr().out
    lines = run.throughput()
    assert lines[0].startswith("speed: ")
    assert all(f"{name} takes" in lines[0] for name in ("generate", "score", "learn"))
    assert printed.rstrip().endswith("\n".join(lines))
    assert 1 <= len(lines) <= 3


def test_the_first_step_warms_up_and_does_not_count(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.train()
    run.work[0] = {"learn": phase(1e6)}
    assert "100%" not in run.throughput()[0]
    del run.work[1]
    assert "learn takes 100% of the time" in run.throughput()[0]


def test_a_silent_run_says_nothing(tmp_path, capsys):
    trainer(tmp_path, max_steps=1).train()
    assert "speed:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("work", "conditions", "words"),
    [
        ({"generate": phase(18.0), "learn": phase(2.0)}, now(critic="separate"), "critic: shared"),  # 5%
        (phases(6.0, 1.0, 3.0) | {"generate": phase(6.0, limit=0.25)}, now(gpu=True), "twice the global_batch_size"),
        (phases(), now(bf16=1.5), "bf16: true"),
        ({"learn": phase(10.0, limit=0.1)}, now(bf16=4.0), None),
    ],
    ids=["worth it", "launch-bound", "fast", "busy"],
)
def test_limits_themselves(work, conditions, words):
    lines = report(work, conditions)[1:]
    assert [words in line for line in lines] == ([True] if words else [])


def test_bf16_is_measured_where_a_run_computes_in_32_bits(monkeypatch):
    peaks = {torch.bfloat16: 300.0}
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, dtype: peaks[dtype])

    def found(device, dtype, frozen=0, peak=100.0):
        policy = SimpleNamespace(frozen=frozen, trained=1 - frozen)
        return conditions(config(), SimpleNamespace(device=torch.device(device), dtype=dtype, peak=peak, policy=policy))

    first = found("cpu", torch.float32)
    assert (first.gpu, first.lora, first.bf16) == (False, False, 3.0)
    second = found("cuda", torch.float16, frozen=1, peak=50.0)
    assert (second.gpu, second.lora, second.bf16) == (True, True, 1.0)
    assert found("xpu", torch.float16).gpu
    peaks[torch.bfloat16] = math.inf  # there was no memory to measure it
    assert found("cpu", torch.float32, peak=math.inf).bf16 == 1.0
    assert found("cpu", torch.float32).bf16 == 1.0
