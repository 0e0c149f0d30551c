"""Run a command's main function and turn what comes out into an exit code."""

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from rlhf.config.caches import cache_error
from rlhf.console import quiet, screen
from rlhf.console.words import path_to
from rlhf.errors import StageDone, UserError
from rlhf.storage.disk import cannot_write

_MISTAKE = 2  # exit code where the user has to change something

_MESSAGE = 3  # lines of a crash's message that are shown


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's main: a UserError becomes one line on standard error and exit code 2, as does a full disk.

    Where output goes to a log, a crash leaves its traceback there, and on the console what and where.
    """
    screen.begin()
    try:
        with quiet.command(), suppress(StageDone):
            main()
    except UserError as error:
        screen.error(f"error: {error}")
        quiet.discard()
        sys.exit(_MISTAKE)
    except OSError as error:
        reason, cache = cannot_write(error), cache_error(error)
        if reason is None and cache is None:
            _crashed(error)
        full = f"{error.filename or 'disk'}: cannot write: {reason}"
        screen.error(f"error: {cache or full}")
        sys.exit(_MISTAKE)
    except SystemExit as end:
        if end.code == _MISTAKE:  # of a stage, which a pipeline passes on
            quiet.discard()
        if not isinstance(end.code, str):
            raise
        screen.error(end.code)  # Python would write it to the log
        sys.exit(1)
    except KeyboardInterrupt:
        if not screen.is_part():  # otherwise the pipeline says it
            screen.error("interrupted")
        sys.exit(130)
    except Exception as error:
        _crashed(error)
    if "rlhf.distributed.collectives" in sys.modules:  # not imported here: `rlhf plan` has no use for torch
        sys.modules["rlhf.distributed.collectives"].exit_together()
    sys.exit(0)


def _crashed(error: Exception) -> NoReturn:
    if quiet.copies is None:
        raise error
    if quiet.is_dropped():  # there is no log
        traceback.print_exception(error, file=quiet.copies.err)
        sys.exit(1)
    traceback.print_exception(error)
    message = f"error: {type(error).__name__}: {error}".strip().split("\n")
    where = traceback.extract_tb(error.__traceback__)[-1]
    rank = f" of rank {quiet.rank()}" if "RANK" in os.environ else ""
    lines = message[:_MESSAGE] + ["..."] * (len(message) > _MESSAGE)
    lines += [f"in {Path(where.filename).name}, line {where.lineno}; the traceback{rank}: {path_to(quiet.copies.log)}"]
    screen.error("\n".join(lines))
    sys.exit(1)
