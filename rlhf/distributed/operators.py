"""DeepSpeed's operators for the CPU: compiled once per machine, also after a build that was killed."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import psutil

from rlhf.console import screen
from rlhf.errors import UserError

_SILENT = 5.0  # seconds of waiting of which nothing is said: the ranks of a run load one after another


def build(builder: Any, name: str, hint: str = "") -> None:
    """Compile an operator, or load it from the cache: builder is one of deepspeed.ops.op_builder.

    Needs a C++ compiler and ninja, no nvcc. The cache is TORCH_EXTENSIONS_DIR (default ~/.cache/torch_extensions) and
    is valid only for the kind of CPU that compiled it. A UserError that begins with the name if that fails.
    """
    try:
        with _one_builder():
            builder.load()
    except Exception as error:  # from compiler, linker or loader
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{name} did not compile; install a C++ compiler and ninja{hint}: {reason.strip()[:200]}"
        ) from error


def build_communication() -> None:
    """What DeepSpeed's processes on CPUs exchange tensors by. It would compile it as it starts its processes."""
    from deepspeed.accelerator import get_accelerator  # importing it takes seconds

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")  # None where it is not for a CPU
    if builder is not None and builder.is_compatible():
        build(builder, "DeepSpeed's communication on CPUs")


@contextmanager
def _one_builder() -> Iterator[None]:
    """For the block, no other run builds an operator, and no lock of a killed build is left.

    PyTorch builds under a file `lock` that names no owner. Whoever comes later waits until the file is gone: for ever,
    if the build was killed. So runs take turns by a lock that ends with its process, and note in it that they build.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with (root / "rlhf-build").open("a+", encoding="utf-8") as file:
        alone = _take(file)
        file.seek(0)
        _clear(root, was_killed=alone and file.read() != "")
        try:
            if alone:
                file.write("building\n")
                file.flush()
            yield
        finally:
            if alone:
                file.truncate(0)


def _take(file: TextIO) -> bool:
    """Wait for the lock; False if this file system has none."""
    said_after, how = time.monotonic() + _SILENT, fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        try:
            fcntl.flock(file, how)
            return True
        except BlockingIOError:  # another run has it
            time.sleep(0.05)
        except OSError:
            return False
        if time.monotonic() >= said_after:
            screen.say("waiting for another run that compiles DeepSpeed's operators (minutes, once)")
            how = fcntl.LOCK_EX


def _clear(root: Path, was_killed: bool) -> None:
    """Remove the locks of a killed run; name those of other programs, which may be building."""
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        if was_killed and not _is_open(lock):
            lock.unlink(missing_ok=True)
            screen.warn(f"{lock}: removed, since the run that built {lock.parent.name} was killed")
        else:
            screen.warn(
                f"{lock}: {lock.parent.name} is being built for DeepSpeed; who needs it waits until this file is gone; "
                "delete it if no build is running, since one was killed"
            )


def _is_open(lock: Path) -> bool:
    """Whether a process that this one can see is building: it keeps its lock open."""
    for process in psutil.process_iter():
        try:
            if any(file.path == str(lock) for file in process.open_files()):
                return True
        except (psutil.Error, OSError):  # ended meanwhile, or another user's
            continue
    return False
