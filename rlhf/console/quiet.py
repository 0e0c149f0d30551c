"""Libraries' own output goes to a log of the run, at the level of file descriptors, so that C code is caught, too.

Only in a process that is one of our commands. Where somebody's own script trains, its output is left alone.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

VERBOSE = "RLHF_VERBOSE"  # set: libraries' output stays on the console, also of processes started from here


_NOWHERE = Path(os.devnull)


@dataclass(frozen=True)
class Copies:
    """The console as it was before stdout and stderr became the log."""

    out: TextIO
    err: TextIO
    log: Path
    made: tuple[Path, ...]  # folders of the log that were not there before, the innermost first


copies: Copies | None = None  # None: stdout and stderr are the console

is_command = False  # this process runs a command of ours


@contextmanager
def command() -> Iterator[None]:
    """Inside the block, this process is a command of ours: `log_to` may redirect its output."""
    global is_command
    is_command = True
    try:
        yield
    finally:
        is_command = False


def log_to(folder: Path, name: str) -> None:
    """From now on, what is written to stdout and stderr goes to FOLDER/NAME.log; each further rank has its own file.

    Nothing happens in other processes than commands, with --verbose, or if the file cannot be written.
    """
    path = folder / (f"{name}.log" if not rank() else f"{name}-rank{rank()}.log")
    made = copies.made if copies else tuple(one for one in (folder, *folder.parents) if not one.exists())
    if _may_redirect():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            _redirect(path, made)
            print(time.strftime("==== %Y-%m-%d %H:%M:%S"), " ".join(sys.argv), flush=True)


def drop() -> None:
    """From now on, what is written to stdout and stderr is lost: for a dry run, which writes no log."""
    if _may_redirect():
        _redirect(_NOWHERE, ())


def is_dropped() -> bool:
    """Whether `drop` was called."""
    return copies is not None and copies.log == _NOWHERE


def _may_redirect() -> bool:
    return is_command and not os.environ.get(VERBOSE) and _has_descriptors()


def _redirect(path: Path, made: tuple[Path, ...]) -> None:
    """An OSError, and nothing has changed, if the file cannot be written."""
    global copies
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = (copies.out, copies.err) if copies else (_copy(sys.stdout), _copy(sys.stderr))
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    copies = Copies(out, err, path, made)


def discard() -> None:
    """Remove the run's folder if this process has made it and it holds only logs: a mistake leaves nothing behind."""
    run = copies.log.parent.parent if copies else None
    if copies is None or run not in copies.made:
        return
    with suppress(OSError):  # another process of this run may be at the same
        if [one.name for one in run.iterdir()] == [copies.log.parent.name]:
            shutil.rmtree(run)
    for folder in copies.made:
        with suppress(OSError):  # one that is gone, or that holds something else
            folder.rmdir()


@contextmanager
def logged(folder: Path, name: str) -> Iterator[None]:
    """As `log_to`, as long as the block takes."""
    global copies
    log_to(folder, name)
    try:
        yield
    finally:
        if copies:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(copies.out.fileno(), 1)
            os.dup2(copies.err.fileno(), 2)
            copies = None


def note(text: str) -> None:
    """Write a line of the console to the log as well."""
    if copies:
        print(text, flush=True)


def rank() -> int:
    """This process's number among those that a launcher started."""
    return int(os.environ.get("RANK") or 0)


def _has_descriptors() -> bool:
    """Whether Python's stdout and stderr are the process's own; in a notebook or under a test runner they are not."""
    try:
        return (sys.stdout.fileno(), sys.stderr.fileno()) == (1, 2)
    except (AttributeError, OSError, ValueError):
        return False


def _copy(stream: TextIO) -> TextIO:
    return os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors="replace", buffering=1)
