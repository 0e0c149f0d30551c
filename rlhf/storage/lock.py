"""One writer per folder: a lock file that names its owner. Stale locks are taken over."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from accelerate import PartialState

from rlhf.console import screen
from rlhf.distributed.collectives import from_main
from rlhf.errors import UserError
from rlhf.file_types import LockOwner
from rlhf.storage.disk import writing

NAME = ".lock"

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # errors of file systems without hard links


class FolderLock:
    """FOLDER/.lock with the host, process and Slurm job of its owner.

    `take` takes over a lock whose owner is gone: a process of this host that no longer runs, or an earlier start of
    the same Slurm job. Whether a process on another host still runs is unknown, so its lock is respected.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def take(self) -> None:
        """Become the owner; a UserError that names the owner if it is somebody else."""
        follows = ""
        with writing(self.path):
            while not self._create():
                follows = self._clear()
        if follows:
            screen.warn(f"{self.path}: taken over from {follows}")

    def release(self) -> None:
        """Remove the lock if this process owns it."""
        with suppress(FileNotFoundError), self._alone() as file:
            if _read(file) == _self():
                self.path.unlink()

    def is_ours(self) -> bool:
        """Whether this process already owns the lock."""
        with suppress(FileNotFoundError), self._alone() as file:
            return _read(file) == _self()
        return False

    def _create(self) -> bool:
        """Create the lock file, owner included, in one atomic step; False if it exists.

        A hard link is atomic even between nodes that do not share flock, so only one process can create it, and nobody
        sees the file without an owner.
        """
        mine = _self()
        aside = self.path.with_name(f"{NAME}.{mine['host']}.{mine['pid']}")
        try:
            with aside.open("w", encoding="utf-8") as file:
                json.dump(mine, file)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(aside, self.path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                with self.path.open("x", encoding="utf-8") as file:  # not atomic: briefly without an owner
                    json.dump(mine, file)
        except FileExistsError:
            return False
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _clear(self) -> str:
        """Delete a stale lock and return a description of its owner; a UserError if the owner may still run."""
        gone = ""
        with suppress(FileNotFoundError), self._alone() as file:
            owner = _read(file)
            gone = f"{_who(owner)}, {self._gone(owner)}" if owner else ""
            self.path.unlink()
        return gone

    def _gone(self, owner: LockOwner) -> str:
        """Why the owner is known to be gone; a UserError if it may still run."""
        mine = _self()
        if owner.get("host") == mine["host"]:
            if _start(owner.get("pid")) != owner.get("start"):
                return "which no longer runs"
        elif owner.get("job") and owner["job"] == mine["job"] and _restarts(owner) < mine["restarts"]:
            return "an earlier start of this Slurm job"
        raise UserError(
            f"{self.path}: in use by {_who(owner)}; wait for it to end, or, if it has ended, remove the file: "
            f"rm {self.path}"
        )

    @contextmanager
    def _alone(self) -> Iterator[TextIO]:
        """The open file, locked against other processes of this machine while it is read and changed."""
        while True:
            with self.path.open("r+", encoding="utf-8") as file:
                with suppress(OSError):  # some network file systems have no flock
                    fcntl.flock(file, fcntl.LOCK_EX)
                if self._is_there(file):
                    yield file
                    return

    def _is_there(self, file: TextIO) -> bool:
        """Whether the path still leads to the open file; its owner may have released it meanwhile."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        return False


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Lock the folder on rank 0 for the block. A lock that this process already holds stays after it."""
    lock = FolderLock(folder)

    def take() -> bool:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if lock.is_ours():
            return False
        lock.take()
        return True

    taken = from_main(take)
    try:
        yield
    finally:
        if taken and PartialState().is_main_process:
            lock.release()


def _self() -> LockOwner:
    """This process as an owner. A Slurm job keeps its id on all nodes and when it is requeued."""
    pid, job = os.getpid(), os.environ.get("SLURM_JOB_ID")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")  # not set at the first start
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "start": _start(pid),
        "job": job,
        "restarts": int(restarts) if restarts.isdecimal() else 0,
    }


def _restarts(owner: LockOwner) -> int:
    found = owner.get("restarts")
    return found if isinstance(found, int) else 0


def _start(pid: Any) -> str | None:
    """Boot id and start time in clock ticks of a process of this host; None if it does not run.

    This tells apart two processes that got the same pid, and does not depend on a clock that can be set.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # The second field, the name in brackets, may hold blanks; the start is the 22nd.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"  # a zombie no longer writes


def _read(file: TextIO) -> LockOwner:
    """The owner; {} if the file is empty or broken."""
    try:
        owner = json.load(file)
    except ValueError:
        return {}
    return cast(LockOwner, owner) if isinstance(owner, dict) else {}


def _who(owner: LockOwner) -> str:
    job = f" of Slurm job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on host {owner.get('host')}{job}"
