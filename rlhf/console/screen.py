"""Lines that a person reads: plain in files and pipes, with colours and a live line on a terminal."""

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

from rlhf.console import quiet
from rlhf.console.words import clock
from rlhf.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

STAGE = "RLHF_STAGE"  # set by a pipeline for its stages: "2/5"

INDENT = "      "  # of what belongs to a stage

_FACTS = 34  # column of a stage's facts

_TIME = 84  # column where a stage's seconds end

_WIDEST = 120  # of wrapped text

_began = time.monotonic()

on_error: list[Callable[[], None]] = []  # what takes live lines away before an error is shown


def begin() -> None:
    """A command begins."""
    global _began
    _began = time.monotonic()


def say(text: str = "", style: str = "") -> None:
    """Print lines, on rank 0. On a terminal each is wrapped to its width; style: of rich, such as "bold"."""
    quiet.note(text)
    if not quiet.rank():
        _write(text, style, _out())


def to_copy(text: str) -> None:
    """A path or a command to copy: never broken into lines, however narrow the terminal."""
    quiet.note(text)
    if not quiet.rank():
        _write(text, "", _out(), wrap=False)


def warn(text: str) -> None:
    """A warning that a person should read, on rank 0."""
    say(f"{INDENT if quiet.is_command else ''}! {printable(text)}", "yellow")


def error(text: str) -> None:
    """Lines about an error, on standard error; any rank may say them."""
    while on_error:
        on_error.pop()()
    quiet.note(text)
    _write(text, "red", quiet.copies.err if quiet.copies else sys.stderr)


def stage(title: str, facts: str = "") -> None:
    """The first line of a stage's block."""
    head = f"{place()}{title}"
    say(f"{head:<{_FACTS}}{facts}" if len(head) < _FACTS else f"{head}  {facts}", "bold")


def ended(text: str) -> None:
    """The last line of a stage's block, with the time since the command began."""
    line = INDENT + text
    took = clock(time.monotonic() - _began)
    until = min(_TIME, _width() or _TIME) - len(took)
    say(f"{line:<{until}}{took}" if len(line) < until else f"{line}   {took}")


def note(text: str) -> None:
    """A line inside a stage's block."""
    say("\n".join(INDENT + line for line in text.split("\n")))


def place() -> str:
    """Which stage of how many this is, such as "[2/5] "; empty for a stage that runs alone."""
    return f"[{os.environ[STAGE]}] " if is_part() else ""


def is_part() -> bool:
    """Whether a pipeline runs this command, and prints the first and last lines itself."""
    return STAGE in os.environ


def table(rows: Sequence[Sequence[str]], align: str, gap: int = 3) -> str:
    """Cells as columns. align: a character per column, < or >."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(align))]
    lines = [(" " * gap).join(f"{c:{a}{w}}" for c, a, w in zip(row, align, widths, strict=False)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def is_live() -> bool:
    """Whether lines may be redrawn: only on a terminal that can, where no library prints in between."""
    return _is_terminal(_out()) and not os.environ.get(quiet.VERBOSE) and not quiet.rank()


def _is_terminal(file: TextIO) -> bool:
    return file.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def busy(doing: str) -> Iterator[None]:
    """On a terminal: a line that says what is being done, as long as the block takes."""
    if not is_live():
        yield
        return
    from rich.live import Live
    from rich.spinner import Spinner

    with Live(Spinner("dots", f" {doing}"), refresh_per_second=8, **live_options()):
        yield


def live_options() -> dict[str, Any]:
    """For what `rich` redraws: where, and that it leaves libraries' output alone."""
    return {"console": _rich(_out()), "transient": True, "redirect_stdout": False, "redirect_stderr": False}


@cache
def _rich(file: TextIO) -> "Console":
    from rich.console import Console

    return Console(file=file, force_terminal=True, highlight=False, markup=False, emoji=False, soft_wrap=False)


def _out() -> TextIO:
    return quiet.copies.out if quiet.copies else sys.stdout


def _width() -> int | None:
    """Columns for text; None where it is not a terminal."""
    return min(_rich(_out()).width, _WIDEST) if _is_terminal(_out()) else None


def _wrapped(line: str, width: int) -> list[str]:
    """Lines for a terminal; what goes on stands below its beginning. A long word, such as a path, is not broken."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(line, width, subsequent_indent=indent, **options) or [""]


def _write(text: str, style: str, file: TextIO, wrap: bool = True) -> None:
    lines = [printable(line) for line in text.split("\n")]
    try:
        if _is_terminal(file):
            from rich.text import Text

            for line in lines:
                for part in _wrapped(line, min(_rich(file).width, _WIDEST)) if wrap else [line]:
                    _rich(file).print(Text(part, style=style), soft_wrap=True)
        else:
            _plain("\n".join(lines), file)
    except BrokenPipeError:  # a reader that has gone away must not end a training run
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def _plain(text: str, file: TextIO) -> None:
    try:
        print(text, file=file, flush=True)
    except UnicodeEncodeError:  # a terminal or a file that knows fewer characters
        print(text.encode(file.encoding, "replace").decode(file.encoding), file=file, flush=True)
