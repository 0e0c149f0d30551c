"""After a stop signal a run finishes its step, saves, and can be resumed as if it had never stopped."""

import itertools
import os
import signal
import time

import pytest
import torch
from tiny_ppo import PROMPTS, metrics, timeless, trainer

from rlhf.distributed import preemption
from rlhf.distributed.preemption import StopAtOnce, StopRequest
from rlhf.storage.checkpoint import checkpoints
from rlhf.storage.run_folder import Stage
from rlhf.storage.stages import read_run


def signal_in(run, phase, number, call=1):
    """The run gets the signal when it begins the phase for the given time."""
    inner, calls = getattr(run, phase), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return inner(*args)

    setattr(run, phase, interrupted)


STOPS = [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """A shell may have started the tests in the background, where Ctrl-C is ignored."""
    before = {number: signal.getsignal(number) for number in STOPS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        *itertools.product(["collect", "compute_advantages", "learn", "record"], [signal.SIGUSR1, signal.SIGTERM]),
        ("learn", signal.SIGINT),
        ("record", signal.SIGINT),
        ("collect", signal.SIGHUP),
    ],
)
def test_a_signal_in_any_phase_costs_nothing(tmp_path, phase, number):
    whole = trainer(tmp_path / "whole")
    whole.train()
    cut = trainer(tmp_path / "cut", save_strategy="no")
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


@pytest.fixture
def presses(monkeypatch):
    """Press Ctrl-C at these seconds."""
    now = [0.0]
    monkeypatch.setattr(preemption, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))

    def press(second):
        now[0] = second
        os.kill(os.getpid(), signal.SIGINT)

    return press


def test_a_second_ctrl_c_ends_at_once(presses):
    with StopRequest() as request:
        presses(0.0)
        presses(0.4)  # the launcher hands on what the terminal has sent already
        assert request.asked()
        with pytest.raises(KeyboardInterrupt):
            presses(5.0)


def test_a_second_ctrl_c_is_known_to_inner_and_outer_requests(presses):
    with StopRequest():
        presses(0.0)
        with StopRequest() as inner:
            assert inner.asked()
            with pytest.raises(KeyboardInterrupt):
                presses(5.0)
    with StopRequest() as outer:
        with StopRequest():
            presses(10.0)
        assert outer.asked()
        with pytest.raises(KeyboardInterrupt):
            presses(15.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_other_signals_may_come_again(number):
    with StopRequest() as request:
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert request.asked()


@pytest.mark.parametrize("request_type", [StopRequest, StopAtOnce])
def test_what_a_shell_has_told_it_to_ignore_stays_ignored(request_type):
    """`nohup COMMAND`, and `COMMAND &` in a script."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with request_type() as request:
        for number in (signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN
        assert not getattr(request, "received", False)


@pytest.mark.parametrize("number", STOPS)
def test_a_stage_without_steps_is_stopped_and_not_failed(tmp_path, number):
    before = signal.getsignal(number)

    def stage():
        with StopAtOnce(), Stage(tmp_path, "evaluation", {}, 1):
            os.kill(os.getpid(), number)
            time.sleep(60)  # it ends long before

    with pytest.raises(KeyboardInterrupt):
        stage()
    facts = read_run(tmp_path)
    assert (facts["status"], facts.get("error")) == ("stopped", None)
    assert not (tmp_path / ".lock").exists()
    assert signal.getsignal(number) is before


def test_what_is_put_in_order_after_a_stop_is_not_disturbed(presses):
    steps = []
    with pytest.raises(KeyboardInterrupt), StopAtOnce():  # noqa: PT012
        try:
            presses(1.0)
        finally:
            presses(1.9)  # two presses within a second are one
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("in order")
    assert steps == ["in order"]
    with pytest.raises(KeyboardInterrupt), StopAtOnce():  # noqa: PT012
        try:
            presses(1.0)
        finally:
            presses(3.0)
            steps.append("never")
    assert steps == ["in order"]
