"""After a stop signal a run finishes its step, saves, and can be resumed as if it had never stopped."""

import os
import signal

import pytest
import torch
from tiny_ppo import PROMPTS, metrics, timeless, trainer

from rlhf.distributed.preemption import StopRequest
from rlhf.storage.checkpoint import checkpoints


def signal_in(run, phase, number, call=1):
    """The run gets the signal when it begins the phase for the given time."""
    inner, calls = getattr(run, phase), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return inner(*args)

    setattr(run, phase, interrupted)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["collect", "compute_advantages", "learn", "record"])
def test_a_signal_in_any_phase_costs_nothing(tmp_path, phase, number):
    whole = trainer(tmp_path / "whole")
    whole.train()
    cut = trainer(tmp_path / "cut")
    signal_in(cut, phase, number, call=2)
    cut.train()
    assert cut.stopped
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["step-2"]
    assert [row["step"] for row in metrics(tmp_path / "cut")] == [1, 2]
    again = trainer(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert not again.stopped
    assert [row["step"] for row in metrics(tmp_path / "cut")] == [1, 2, 3, 4]
    for (name, a), (_, b) in zip(
        whole.roles.trained.named_parameters(), again.roles.trained.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["evaluate", "_fit_scores", "_begin"])
def test_a_signal_before_the_first_step_stops_after_it(tmp_path, phase, number):
    options = {"eval_on_start": True, "score_norm_samples": 4, "given": {"eval_dataset": PROMPTS[:2]}, "max_steps": 2}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    cut = trainer(tmp_path / "cut", **options)
    signal_in(cut, phase, number)
    cut.train()
    assert cut.stopped
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["step-1"]
    again = trainer(tmp_path / "cut", **options)
    again.train(resume_from_checkpoint=True)
    assert [timeless(row) for row in metrics(tmp_path / "cut")] == [
        timeless(row) for row in metrics(tmp_path / "whole")
    ]


def test_a_signal_after_the_last_step_stops_nothing(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    signal_in(run.recorder, "end", signal.SIGTERM)
    run.train()
    assert not run.stopped
    assert not run.recorder.is_open


def test_one_request_in_another():
    with StopRequest() as outer:
        with StopRequest() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.asked()
        assert outer.asked()
        with StopRequest() as later:
            assert later.asked()


def test_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        assert not request.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.asked()
    assert signal.getsignal(signal.SIGTERM) is before
