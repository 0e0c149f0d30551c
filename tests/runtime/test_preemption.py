"""Told to stop, a run ends the step it is in, saves, and goes on later as if nothing had been."""

import os
import signal

import pytest
import torch
from tiny_ppo import metrics, trainer

from rlhf.runtime.checkpoint import checkpoints
from rlhf.runtime.preemption import StopRequest


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["act", "judge", "learn", "record"])
def test_a_signal_in_any_phase_costs_nothing(tmp_path, phase, number):
    whole = trainer(tmp_path / "whole")
    whole.train()
    cut = trainer(tmp_path / "cut")
    inner, calls = getattr(cut, phase), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return inner(*args)

    setattr(cut, phase, interrupted)
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


def test_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        assert not request.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.asked()
    assert signal.getsignal(signal.SIGTERM) is before
