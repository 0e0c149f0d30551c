"""Untrusted checkpoints: pickles in them may hold only tensors, numbers and texts, checked before anything loads them.

Accelerate 1.15 reads custom_checkpoint_N.pkl, and DeepSpeed 0.19 all its files, by a pickle that may call any
function. Every such file is read here first with torch.load(weights_only=True), which calls none.
"""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.errors import UserError

PICKLES = (".bin", ".pkl", ".pt", ".pth")  # suffixes that torch, Accelerate and DeepSpeed load

# transformers writes it beside its checkpoints; nothing reads it.
NEVER_READ = ("training_args.bin",)

# Classes of arrays, which hold numpy's random state.
_ARRAYS = [np.array(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32))]

# DeepSpeed's own classes for numbers and names in its optimizer state.
_DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)

_FOUND = re.compile(r"GLOBAL (\S+)")


class _Inert:
    """Stands for a class of DeepSpeed during the check, so that DeepSpeed is not imported."""

    def __new__(cls, *_: Any) -> "_Inert":
        return super().__new__(cls)


def check_pickles(folder: Path) -> None:
    """A UserError for the first file in a checkpoint's folder that holds more than tensors, numbers and texts.

    Calls nothing in the files. Also refuses links to folders, and a file `latest`, which leads DeepSpeed to its files,
    that points outside the folder.
    """
    for path in _files(folder):
        if path.name == "latest":
            _check_latest(path)
        elif path.suffix in PICKLES and path.name not in NEVER_READ:
            _check(path)


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        for name in sorted(folders):
            if (Path(place) / name).is_symlink():
                raise UserError(f"{Path(place) / name}: expected a folder of the checkpoint, found a link")
        yield from (Path(place) / name for name in sorted(files))


def _check(path: Path) -> None:
    allowed: list[Any] = [*_ARRAYS, *((_Inert, name) for name in _DEEPSPEED)]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
            # Memory-mapped: the data of tensors are not read.
            torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can raise almost anything
        raise UserError(f"{path}: expected tensors, numbers and texts, found {_what(error)}") from error


def _what(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    found = _FOUND.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return f"a pickle that calls {found[1]}" if found else "what torch cannot load as such"


def _check_latest(path: Path) -> None:
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    if Path(name).name != name or name == "..":
        raise UserError(f"{path}: expected the name of a folder beside it, found {name!r}")
