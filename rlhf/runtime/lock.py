"""One writer a folder: a lock file that says who it is, and that outlives nobody who is known to be gone."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rlhf.errors import UserError
from rlhf.runtime.disk import writing

NAME = ".lock"


class FolderLock:
    """FOLDER/.lock with the host, process and Slurm job that writes there.

    `take` passes over an owner that is gone: one of this host that no longer runs, or an earlier start of the
    Slurm job that this is. Of a process on another host nothing can be known, so it is never taken to be gone.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def take(self) -> None:
        """Become the owner; a UserError that says who it is where it is somebody else."""
        with writing(self.path), self._alone(os.O_RDWR | os.O_CREAT) as file:
            owner = _read(file)
            if owner:
                print(f"{self.path}: taken over from {_who(owner)}, {self._gone(owner)}")
            file.seek(0)
            file.truncate()
            json.dump(_self(), file)
            file.flush()
            os.fsync(file.fileno())

    def release(self) -> None:
        """Nobody's again, if it was ours."""
        with suppress(FileNotFoundError), self._alone(os.O_RDWR) as file:
            if _read(file) == _self():
                self.path.unlink()

    def _gone(self, owner: dict[str, Any]) -> str:
        """Why the owner is gone; a UserError where it may be there."""
        mine = _self()
        if owner.get("host") == mine["host"]:
            if _start(owner.get("pid")) != owner.get("start"):
                return "which no longer runs"
        elif owner.get("job") and owner["job"] == mine["job"]:
            return "an earlier start of this Slurm job"
        raise UserError(
            f"{self.path}: expected no other run that writes there, found {_who(owner)}; "
            f"if it has ended, remove the file: rm {self.path}"
        )

    @contextmanager
    def _alone(self, flags: int) -> Iterator[TextIO]:
        """The file, open, with no other process between reading and writing it."""
        while True:
            with open(os.open(self.path, flags, 0o644), "r+", encoding="utf-8") as file:
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


def _self() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "start": _start(pid), "job": os.environ.get("SLURM_JOB_ID")}


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


def _read(file: TextIO) -> dict[str, Any]:
    """The owner; {} where there is none, or one that died as it wrote its name."""
    try:
        owner = json.load(file)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _who(owner: dict[str, Any]) -> str:
    job = f" of Slurm job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on host {owner.get('host')}{job}"
