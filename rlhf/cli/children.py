"""Stages as processes of their own: forked from this one, which has imported everything, or started by a launcher.

A child has a process group of its own, so that Ctrl-C in a terminal reaches it once: this process hears the signal and
hands it on, then waits for the child to save its work. `heard` has the signals so far.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType
from typing import Any

import psutil

from rlhf.cli.script import run_script

HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

heard: list[int] = []  # after the child that was there has ended, nothing more is to start

_ONE_PRESS = 1.0  # seconds, as in rlhf/distributed/preemption.py, whose imports are slow

_AGAIN = 2  # seconds between two stop signals to processes under a launcher, which miss one while they start

_FORK = multiprocessing.get_context("fork")

_DEATH_SIGNAL = 1  # Linux: PR_SET_PDEATHSIG


# Run rlhf.cli.COMMAND with arguments and more environment variables -> its exit code, negative for a signal.
Start = Callable[[str, Sequence[str], dict[str, str]], int]


def prepare(commands: Iterable[str]) -> None:
    """Import what children of `forked` will need. No operation of torch may run here: its threads survive no fork."""
    gc.disable()  # imports leave no garbage, and to look for it would take a fifth of their time
    for name in commands:
        import_module(f"rlhf.cli.{name}")
    with suppress(ImportError):
        import_module("deepspeed")  # Accelerate imports it sooner or later if it is there
    gc.enable()
    gc.collect()
    gc.freeze()  # a child that collects garbage would copy all of the memory


def forked(command: str, argv: Sequence[str], environment: dict[str, str]) -> int:
    """Run rlhf.cli.COMMAND in a fork of this process; returns its exit code, negative for a signal."""

    def main() -> None:
        os.environ.update(environment)
        sys.argv = [f"python -m rlhf.cli.{command}", *argv]
        import_module(f"rlhf.cli.{command}").main()

    return _fork(main)


def answer(work: Callable[[], Any]) -> Any:
    """What `work` returns in a fork. Where it fails, the fork says why, and this process ends with the same code."""
    receive, send = _FORK.Pipe(duplex=False)
    code = _fork(lambda: send.send(work()))
    if code:
        sys.exit(code if code > 0 else 128 - code)
    return receive.recv()


def _fork(main: Callable[[], None]) -> int:
    before = {number: signal.getsignal(number) for number in HANDED_ON}
    asked: list[int] = []

    def run() -> None:
        os.setpgid(0, 0)
        end_with_parent()
        for number in HANDED_ON:
            signal.signal(number, before[number])
        run_script(main)

    process = _FORK.Process(target=run)

    def hand_on(number: int) -> None:
        asked.append(number)
        if process.pid:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    with _handing_on(hand_on):
        process.start()
        for number in asked[:]:  # before there was a child
            hand_on(number)
        process.join()
    return process.exitcode or 0


def launched(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a launcher and its processes; returns its exit code.

    A first signal asks the processes to stop, by SIGUSR1, which the launcher ignores; a second Ctrl-C ends them all.
    """
    pressed: list[float] = []  # when Ctrl-C was

    def hand_on(number: int) -> None:
        pressed.extend([time.monotonic()] if number == signal.SIGINT else [])
        ends = bool(pressed) and pressed[-1] - pressed[0] > _ONE_PRESS
        _signal_below(child.pid, signal.SIGKILL if ends else signal.SIGUSR1)

    before = len(heard)
    with _handing_on(hand_on):
        child = subprocess.Popen(command, env=environment, process_group=0, preexec_fn=_begin_launcher)
        while True:
            try:
                return child.wait(timeout=_AGAIN)
            except subprocess.TimeoutExpired:
                if len(heard) > before:
                    _signal_below(child.pid, signal.SIGUSR1)


def _signal_below(launcher: int, number: int) -> None:
    """Signal the processes of a launcher, which may be in sessions of their own; kill the launcher, too."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(launcher)
        below = parent.children(recursive=number == signal.SIGKILL)
        for process in [*([parent] if number == signal.SIGKILL else []), *below]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _begin_launcher() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    end_with_parent()


@contextmanager
def _handing_on(hand_on: Callable[[int], None]) -> Iterator[None]:
    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        hand_on(number)

    # What `nohup` and a shell's & let this process ignore stays ignored.
    handled = [number for number in HANDED_ON if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Linux: be told to stop if the parent dies, even if it is killed. Elsewhere a child then runs to its end."""
    if sys.platform == "linux":
        library: Any = ctypes.CDLL(None)
        library.prctl(_DEATH_SIGNAL, int(signal.SIGTERM))


def forget_script_folder() -> None:
    """Import nothing more from the script's folder, or from the current one, where a random.py would win."""
    if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd(), os.path.dirname(os.path.abspath(sys.argv[0]))):
        del sys.path[0]
