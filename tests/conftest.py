"""Every process of a test is interrupted as from a terminal, also where the tests run in a script's background."""

import signal

# A shell ignores SIGINT for what it starts with `&`, and all children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
