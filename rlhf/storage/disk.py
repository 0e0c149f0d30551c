"""Files that survive a crash: flushed before anything relies on them, complete or absent, checked when read."""

import errno
import filecmp
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlhf.errors import UserError
from rlhf.file_types import FileDigest, Manifest

MANIFEST = "manifest.json"

# Without one of these nobody takes a folder for a model: they are removed first and written last.
_HEADS = ("config.json", "adapter_config.json")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def cannot_write(error: OSError) -> str | None:
    """The reason if the disk is full or read-only; None for other errors."""
    return error.strerror if error.errno in _FULL else None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error while writing (a full disk, no permission) into one line for the user."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot write: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:  # not JSON, too deeply nested, or a folder
        raise UserError(f"{path}: expected JSON, found: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush everything in a folder to the disk."""
    for path in sorted(folder.rglob("*")):
        flush(path)
    flush(folder)


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary file, flush and rename; the temporary file is removed on failure."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(content)
            flush(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def write_manifest(folder: Path) -> None:
    """Write FOLDER/manifest.json: path, size and sha256 of every file. Everything is on the disk when this returns.

    Each file is read once, while it is probably still in the page cache; the manifest is written last.
    """
    files: dict[str, FileDigest] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    flush_folder(folder)
    aside = folder / f".{MANIFEST}"
    aside.write_text(json.dumps(Manifest(files=files), indent=1), encoding="utf-8")
    flush(aside)
    os.replace(aside, folder / MANIFEST)
    flush(folder)


def fault(folder: Path) -> str | None:
    """What is wrong with a folder according to its manifest; None if it is intact."""
    try:
        manifest: Manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {folder / name: (facts["size"], facts["sha256"]) for name, facts in manifest["files"].items()}
        led_out = any(".." in path.parts or not path.is_relative_to(folder) for path in expected)
    except FileNotFoundError:
        return f"no {MANIFEST}, which is written last"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"a {MANIFEST} that cannot be read"
    if led_out:
        return f"a {MANIFEST} that names files elsewhere"
    for path, (size, digest) in expected.items():
        name = path.relative_to(folder)
        if not path.is_file():
            return f"no {name}"
        if path.stat().st_size != size:
            return f"{name} of {path.stat().st_size} bytes where {size} were written"
        if _sha256(path) != digest:
            return f"{name} with other content than was written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written_aside(folder: Path, is_main: bool) -> Iterator[Path]:
    """Yield a temporary folder for a model; its files move to FOLDER if the block ends without an error.

    Until then FOLDER is unchanged, and while files move it has no config, so a model there is complete or absent. On
    ranks other than 0 only the block runs.
    """
    aside = folder / ".aside"
    with writing(folder):
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        try:
            yield aside
            if is_main:
                flush_folder(aside)
                _move_in(aside, folder)
        finally:
            if is_main:
                shutil.rmtree(aside, ignore_errors=True)


def store_once(path: Path, copies: Iterable[Path]) -> None:
    """Make the copies that hold the same bytes hard links to `path`, where the file system has them.

    Each is complete at any moment. Files of a run are replaced, never changed in place, so one never changes another.
    """
    for copy in copies:
        if not copy.samefile(path) and filecmp.cmp(path, copy, shallow=False):
            link = copy.with_name(f".{copy.name}.link")
            with suppress(OSError):  # otherwise both stay
                link.unlink(missing_ok=True)
                os.link(path, link)
                os.replace(link, copy)


def _move_in(aside: Path, folder: Path) -> None:
    for name in _HEADS:
        (folder / name).unlink(missing_ok=True)
    flush(folder)
    for path in sorted(aside.iterdir(), key=lambda path: path.name in _HEADS):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
    flush(folder)
