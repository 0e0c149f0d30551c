"""The folder where stages meet: each stage's `run.json`, and files that are whole or absent."""

import json
import os
import re
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

from rlhf.distributed.collectives import from_main
from rlhf.distributed.launch import check_process_count
from rlhf.errors import UserError
from rlhf.file_types import RunFile, Settings
from rlhf.perf.hardware import device_name, peak_memory, unused_devices
from rlhf.storage.disk import flush, writing
from rlhf.storage.lock import FolderLock
from rlhf.storage.stages import is_done

PACKAGES = ("accelerate", "bitsandbytes", "datasets", "deepspeed", "peft", "torch", "transformers", "trl")

# Of the command line only what may be read by others is kept: --hub_token hf_...
_TOKEN = re.compile(r"(--\w*hub[_-]token[ =]|\bhf_(?=\w{20}))\S+")


def write_json(path: Path, content: Any) -> None:
    """Write aside and rename, so that a reader never sees half a file. Values must be finite or None."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write aside and rename."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write aside, flush and rename; what was written aside does not stay behind when it fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(content)
            flush(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, written aside and renamed."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """One more JSON line."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


class StageDone(Exception):  # noqa: N818  nothing is wrong
    """Another run ended the stage while this one got ready; `run_script` leaves quietly."""


class Stage:
    """One stage of a run as a context: run.json says running, then done, stopped or failed. Written by rank 0 only.

    Inside it the folder is locked: a second run of the same stage is refused. One that is done is not begun again.
    """

    def __init__(self, folder: Path, name: str, config: Settings, seed: int) -> None:
        self.folder, self._lock = folder, FolderLock(folder)
        state = PartialState()
        wanted = os.environ.get("RLHF_WORLD_SIZE")  # what a job script started
        if wanted is not None:
            check_process_count("RLHF_WORLD_SIZE", int(wanted), state.num_processes)
        self.is_main = state.is_main_process
        self.stopped = False  # set when the stage was told to stop before its end; it can go on later
        self.facts: RunFile = {
            "stage": name,
            "id": uuid.uuid4().hex,  # of this start: what came of it can be told apart without a clock
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
            "config": config,
        }

    def record(self, **facts: Unpack[RunFile]) -> None:
        """Add facts to run.json at once."""
        self.facts.update(facts)
        if self.is_main:
            write_json(self.folder / "run.json", self.facts)

    def __enter__(self) -> "Stage":
        if from_main(self._take):
            if self.is_main:
                print(f"{self.facts['stage']}: done already in {self.folder}")
            raise StageDone
        if self.is_main and (line := unused_devices(PartialState().device)):
            print(line)
        self._clock = time.monotonic()
        self.record()
        return self

    def _take(self) -> bool:
        """Make the folder and lock it; whether the stage is done already, which nobody can change from then on."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run folder {self.folder}: expected to write there, found: {error.strerror}") from error
        self._lock.take()
        done = True
        try:
            done = is_done(self.folder)
        finally:
            if done:
                self._lock.release()
        return done

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.facts["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        status: Literal["failed", "stopped", "done"] = (
            "failed" if error is not None else "stopped" if self.stopped else "done"
        )
        seconds = round(time.monotonic() - self._clock, 1)
        try:
            self.record(status=status, ended=_now(), seconds=seconds, peak_memory=peak_memory(PartialState().device))
        except UserError:  # a full disk: what failed before says so already
            if error is None:
                raise
        finally:
            if self.is_main:
                self._lock.release()


def command_line() -> str:
    """What started this process, as one would type it."""
    module = getattr(sys.modules["__main__"].__spec__, "name", "")  # of `python -m MODULE`, which has a path in argv
    started = f"python -m {module}" if module.startswith("rlhf.") and sys.argv[0].endswith(".py") else sys.argv[0]
    return " ".join([started, *sys.argv[1:]])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    """Version of each package that a result may depend on."""
    return {p: metadata.version(p) for p in PACKAGES}


def git_commit() -> str | None:
    """The commit of the repository that this code is in, None without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed without its repository
        return None
    result = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
    )
    return result.stdout.strip() or None
