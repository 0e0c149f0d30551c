"""The one exception for a user's mistake."""


class UserError(ValueError):
    """A wrong input: the message is one line that says where, what was expected and what was found.

    Scripts print it without a traceback and exit with code 2. Whatever names and data it quotes, it stays one line of
    characters that can be seen.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))
