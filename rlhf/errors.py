"""The one exception for a user's mistake."""


class UserError(ValueError):
    """A wrong input: the message is one line that says where, what was expected and what was found.

    Scripts print it without a traceback and exit with code 2.
    """
