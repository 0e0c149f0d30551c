"""Every process of a test is interrupted as from a terminal, also where the tests run in a script's background."""

import gc
import signal

# A shell ignores SIGINT for what it starts with `&`, and all children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Libraries and tests that are imported by now stay: no collection of garbage has to read them again.

    Accelerate collects once per training, which took half a second each time.
    """
    gc.collect()
    gc.freeze()
