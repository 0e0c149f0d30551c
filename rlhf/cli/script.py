"""Run a command's main function and turn what comes out into an exit code."""

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from rlhf.distributed.collectives import exit_together
from rlhf.errors import UserError
from rlhf.storage.disk import cannot_write
from rlhf.storage.run_folder import StageDone


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's main: a UserError becomes one line on standard error and exit code 2, as does a full disk."""
    try:
        with suppress(StageDone):
            main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        reason = cannot_write(error)
        if reason is None:
            raise
        print(f"error: {error.filename or 'disk'}: cannot write: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    exit_together()
    sys.exit(0)
