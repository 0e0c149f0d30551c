"""The exceptions that a command answers in a line, what a user may have meant, and text that may be printed."""

from collections.abc import Iterable
from difflib import get_close_matches

_JOINERS = "\u200c\u200d"  # not printable by themselves, but parts of words in several scripts, and of emoji


def printable(text: str, keep: str = "") -> str:
    r"""The text without anything that controls a terminal. Whatever comes from data or models is printed through here.

    White space becomes a blank. Other characters that are not printable (escape codes, C1 codes, overrides of the
    writing direction, halves of surrogate pairs) are spelled out, as \x1b. Characters in `keep` stay.
    """
    return "".join(
        c if c.isprintable() or c in keep or c in _JOINERS else " " if c.isspace() else ascii(c)[1:-1] for c in text
    )


class UserError(ValueError):
    """A user's mistake: one line that names the file, row or field and says what to do.

    Scripts print it without a traceback and exit with code 2. It may quote data, so it is made printable.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def did_you_mean(found: object, known: Iterable[str]) -> str:
    """The end of an error line: `; did you mean 'NAME'?`, or nothing if no known name is close.

    If none is, one or two that end with it are: of `seed` the fields `eval_seed` and `prompt_seed`.
    """
    names = {name.lower(): name for name in known}
    word = str(found)[:200].lower()
    close = get_close_matches(word, names, n=1, cutoff=0.75 if len(word) > 3 else 0.6)
    longer = [name for name in names if word and name.endswith(f"_{word}")]
    meant = close or (longer if len(longer) <= 2 else [])
    return f"; did you mean {' or '.join(repr(names[name]) for name in meant)}?" if meant else ""


class StageDone(Exception):  # noqa: N818  nothing is wrong
    """Another process finished the stage while this one started; `run_script` exits quietly."""
