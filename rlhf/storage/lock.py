"""One writer a folder: a lock file that says who it is, and that outlives nobody who is known to be gone."""

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

from rlhf.distributed.collectives import from_main
from rlhf.errors import UserError, printable
from rlhf.file_types import LockOwner
from rlhf.storage.disk import writing

NAME = ".lock"

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # what a file system without them says


class FolderLock:
    """FOLDER/.lock with the host, process and Slurm job that writes there.

    `take` passes over an owner that is gone: one of this host that no longer runs, or an earlier start of the
    Slurm job that this is. Of a process on another host nothing can be known, so it is never taken to be gone.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def take(self) -> None:
        """Become the owner; a UserError that says who it is where it is somebody else."""
        follows = ""
        with writing(self.path):
            while not self._create():
                follows = self._clear()
        if follows:
            print(printable(f"{self.path}: taken over from {follows}"))

    def release(self) -> None:
        """Nobody's again, if it was ours."""
        with suppress(FileNotFoundError), self._alone() as file:
            if _read(file) == _self():
                self.path.unlink()

    def is_ours(self) -> bool:
        """Whether this very process is the owner already."""
        with suppress(FileNotFoundError), self._alone() as file:
            return _read(file) == _self()
        return False

    def _create(self) -> bool:
        """The file with our name in it, at one stroke; False where there is one.

        Of two that start on two nodes, whose locks of open files may know nothing of one another, one alone can
        give a file that name, and nobody ever finds it without an owner in it.
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
                with self.path.open("x", encoding="utf-8") as file:  # for a moment without an owner in it
                    json.dump(mine, file)
        except FileExistsError:
            return False
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _clear(self) -> str:
        """Delete the file of an owner that is gone, and say who it was; a UserError where it may be there."""
        gone = ""
        with suppress(FileNotFoundError), self._alone() as file:
            owner = _read(file)
            gone = f"{_who(owner)}, {self._gone(owner)}" if owner else ""
            self.path.unlink()
        return gone

    def _gone(self, owner: LockOwner) -> str:
        """Why the owner is gone; a UserError where it may be there."""
        mine = _self()
        if owner.get("host") == mine["host"]:
            if _start(owner.get("pid")) != owner.get("start"):
                return "which no longer runs"
        elif owner.get("job") and owner["job"] == mine["job"] and _restarts(owner) < mine["restarts"]:
            return "an earlier start of this Slurm job"
        raise UserError(
            f"{self.path}: expected no other run that writes there, found {_who(owner)}; "
            f"if it has ended, remove the file: rm {self.path}"
        )

    @contextmanager
    def _alone(self) -> Iterator[TextIO]:
        """The file, open, with no other process between reading and writing it."""
        while True:
            with self.path.open("r+", encoding="utf-8") as file:
                with suppress(OSError):  # some network file systems have no such locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                if self._is_there(file):
                    yield file
                    return

    def _is_there(self, file: TextIO) -> bool:
        """Whether the open file still has its name: its owner may have released it while we waited."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        return False


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """The block runs while rank 0 owns the folder; the lock stays its owner's who took it in this process before."""
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
    """This process. A Slurm job has its number on all of its nodes, and keeps it when it is queued again."""
    pid, job = os.getpid(), os.environ.get("SLURM_JOB_ID")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")  # Slurm sets none at the first start
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
    """When a process of this host started, as clock ticks of a boot; None when there is none of that number.

    No clock that can be set is asked, and a number that was given to another process later is told apart.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # The second field, the name in brackets, may hold blanks; the start is the 22nd.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"  # a zombie writes nothing any more


def _read(file: TextIO) -> LockOwner:
    """The owner; {} where there is none, or one that died as it wrote its name."""
    try:
        owner = json.load(file)
    except ValueError:
        return {}
    return cast(LockOwner, owner) if isinstance(owner, dict) else {}


def _who(owner: LockOwner) -> str:
    job = f" of Slurm job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on host {owner.get('host')}{job}"
