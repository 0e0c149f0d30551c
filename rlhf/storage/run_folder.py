"""The folder where stages meet: each stage's `run.json`, and files that are complete or absent."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack

from accelerate import PartialState

from rlhf.console import screen
from rlhf.distributed.collectives import from_main
from rlhf.distributed.launch import check_process_count
from rlhf.errors import StageDone, UserError
from rlhf.file_types import RunFile, Settings
from rlhf.perf.hardware import device_name, peak_memory, unused_devices
from rlhf.storage.basis import Asked, basis_of, clear, verdict
from rlhf.storage.disk import write_bytes, writing
from rlhf.storage.lock import FolderLock
from rlhf.storage.stages import is_done

PACKAGES = ("accelerate", "bitsandbytes", "datasets", "deepspeed", "peft", "torch", "transformers", "trl")

# Of the command line only what may be read by others is kept: --hub_token hf_...
_TOKEN = re.compile(r"(--\w*hub[_-]token[ =]|\bhf_(?=\w{20}))\S+")


def write_json(path: Path, content: Any) -> None:
    """Write to a temporary file and rename, so that readers never see half a file. Numbers must be finite or None."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary file and rename."""
    write_bytes(path, text.encode("utf-8"))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, by a temporary file and a rename."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def in_run(run: Path, value: Any) -> Any:
    """A value of run.json with the paths in the run's folder relative to it."""
    if isinstance(value, dict):
        return {name: in_run(run, part) for name, part in value.items()}
    if isinstance(value, list):
        return [in_run(run, part) for part in value]
    return value.removeprefix(f"{run}{os.sep}") if isinstance(value, str) else value


def anywhere(model: str) -> str:
    """A model's name, or its path so that it is found from any working directory."""
    return str(Path(model).absolute()) if Path(model).exists() else model


class Stage:
    """Context of one stage: run.json says running, then done, stopped or failed. Only rank 0 writes.

    Inside, the folder is locked, so the same stage cannot run twice at the same time. A finished stage raises
    `StageDone`. One whose results no longer hold is cleared, and starts over.

    asked: the settings that are given. read: earlier stage -> its id.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        config: Settings,
        seed: int,
        asked: Asked | None = None,
        read: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self._lock, self._asked, self._read = folder, FolderLock(folder), asked, read or {}
        state = PartialState()
        wanted = os.environ.get("RLHF_WORLD_SIZE")  # processes that a job script started
        if wanted is not None:
            check_process_count("RLHF_WORLD_SIZE", int(wanted), state.num_processes)
        self.is_main = state.is_main_process
        self.stopped = False  # set it if the stage was told to stop early; it can be resumed
        self.facts: RunFile = {
            "stage": name,
            "id": uuid.uuid4().hex,  # of this start: tells its results apart without a clock
            "status": "running",
            "started": _now(),
            "ended": None,
            "seconds": None,
            "seed": seed,
            "world_size": state.num_processes,
            "device": device_name(state.device),
            "command": _TOKEN.sub(r"\1...", command_line()),
            "versions": package_versions(),
            "git_commit": git_commit(),
            "config": in_run(folder.parent, config),
        }

    def record(self, **facts: Unpack[RunFile]) -> None:
        """Add facts to run.json and write it. Paths in the run are written relative to it: it may be moved."""
        self.facts.update(in_run(self.folder.parent, facts))
        if self.is_main:
            write_json(self.folder / "run.json", self.facts)

    def __enter__(self) -> "Stage":
        if from_main(self._take):
            screen.say(f"{self.facts['stage']}: already done in {self.folder}")
            raise StageDone
        if line := unused_devices(PartialState().device):
            screen.warn(line)
        self._clock = time.monotonic()
        self.record()
        return self

    def _take(self) -> bool:
        """Create the folder and lock it; True, without a lock, if the stage is done and its results hold."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run folder {self.folder}: cannot write: {error.strerror}") from error
        self._lock.take()
        done = True
        try:
            found = verdict(self.folder, self._asked) if self._asked else "done" if is_done(self.folder) else "resume"
            if found == "again":
                write_json(self.folder / "run.json", {"stage": self.facts["stage"], "status": "clearing"})
                clear(self.folder)
            if self._asked:
                self.facts["basis"] = basis_of(self._asked, self._read)
            done = found == "done"
        finally:
            if done:
                self._lock.release()
        return done

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):  # a second Ctrl-C, or any stop signal where nothing is to be saved
            self.stopped, error = True, None
        if error is not None:
            self.facts["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        status: Literal["failed", "stopped", "done"] = (
            "failed" if error is not None else "stopped" if self.stopped else "done"
        )
        seconds = round(time.monotonic() - self._clock, 1)
        try:
            self.record(status=status, ended=_now(), seconds=seconds, peak_memory=peak_memory(PartialState().device))
        except UserError:  # a full disk: the first error already says so
            if error is None:
                raise
        finally:
            if self.is_main:
                self._lock.release()


def command_line() -> str:
    """What started this process, as one would type it."""
    module = getattr(sys.modules["__main__"].__spec__, "name", "")  # of `python -m MODULE`, which has a path in argv
    started = f"python -m {module}" if module.startswith("rlhf.") and sys.argv[0].endswith(".py") else sys.argv[0]
    return " ".join([started, *map(shlex.quote, sys.argv[1:])])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    """Versions of the packages that results may depend on."""
    return {p: metadata.version(p) for p in PACKAGES}


def git_commit() -> str | None:
    """The git commit of this code; None if it is not in a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed without its repository
        return None
    result = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
    )
    return result.stdout.strip() or None
