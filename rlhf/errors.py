"""The one exception for a user's mistake, and text that may be printed."""

_JOINERS = "\u200c\u200d"  # not printable by themselves, but parts of words in several scripts, and of emoji


def printable(text: str, keep: str = "") -> str:
    r"""Text that a terminal shows and does not obey; everything of data or models goes through here before a print.

    White space becomes a blank, and what else is not printable (escape codes, C1 codes, overrides of the writing
    direction, halves of surrogate pairs) is spelled out, as \x1b. Characters in `keep` stay.
    """
    return "".join(
        c if c.isprintable() or c in keep or c in _JOINERS else " " if c.isspace() else ascii(c)[1:-1] for c in text
    )


class UserError(ValueError):
    """A wrong input: the message is one line that says where, what was expected and what was found.

    Scripts print it without a traceback and exit with code 2. It may quote data, so it is made printable.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
