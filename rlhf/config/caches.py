"""The folders outside of a run where models and data are kept, and the variables that name them."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from rlhf.errors import UserError

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)


def cache_folder() -> Path:
    """The folder for converted models: $RLHF_CACHE, or ~/.cache/rlhf."""
    return Path(os.environ.get("RLHF_CACHE") or Path.home() / ".cache" / "rlhf")


def caches() -> dict[str, Path]:
    """Variable -> folder, as the libraries derive it: of our own cache, and of Hugging Face's."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("HF_HOME") or base / "huggingface")
    found = {"RLHF_CACHE": cache_folder(), "HF_HOME": home}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        if value := os.environ.get(name):
            found[name] = Path(value)
    return {name: Path(os.path.abspath(folder.expanduser())) for name, folder in found.items()}


def cache_error(error: BaseException) -> UserError | None:
    """What to say if an error came from a cache that cannot be written; None for other errors."""
    for one in _causes(error):
        if isinstance(one, OSError) and isinstance(one.filename, str | bytes):
            names = _caches_at(Path(os.path.abspath(os.fsdecode(one.filename))), one.errno)
            if names:
                folders = "a folder" if len(names) == 1 else "folders"
                return UserError(
                    f"{os.fsdecode(one.filename)}: cannot write to the cache: {one.strerror}; "
                    f"set {' and '.join(names)} to {folders} that can be written"
                )
    return None


def _caches_at(path: Path, number: int | None) -> list[str]:
    """The variables of the caches that this path is in, or that cannot be made because of it."""
    inside = [name for name, folder in caches().items() if path.is_relative_to(folder)]
    if number in _DENIED and inside:
        return inside[-1:]  # the most special one
    if number in (*_DENIED, errno.ENOENT):
        return [name for name, folder in caches().items() if folder.is_relative_to(path) and path != Path("/")]
    return []


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
