"""Checkpoints from elsewhere: what is pickled in them must be tensors, numbers and texts before anything loads it.

Accelerate 1.15 reads custom_checkpoint_N.pkl, and DeepSpeed 0.19 all of its files, by a pickle that may call any
function. Every such file is read here first, by torch's own loader of weights, which calls none.
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

PICKLES = (".bin", ".pkl", ".pt", ".pth")  # the endings under which torch, accelerate and DeepSpeed look for them

# transformers writes it beside its checkpoints, and neither it nor anything here reads it again.
NEVER_READ = ("training_args.bin",)

# Arrays, as numpy's random state is kept in.
_ARRAYS = [np.array(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32))]

# Numbers and names that DeepSpeed keeps with its optimizer's state, in classes of its own.
_DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)

_FOUND = re.compile(r"GLOBAL (\S+)|class (\S+) was not")


class _Inert:
    """Stands for a class of DeepSpeed while a file is looked at, so that none has to be imported."""

    def __new__(cls, *_: Any) -> "_Inert":
        return super().__new__(cls)


def check_pickles(folder: Path) -> None:
    """A UserError that names the first file in a checkpoint's folder that holds more than tensors, numbers and texts.

    Nothing in them is called. Links to folders are refused, and a file `latest` (by which DeepSpeed is led to its
    files) that names something outside the folder.
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
            # Mapped, not read: of tensors only the places are looked at.
            torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file makes the loader raise almost anything
        raise UserError(f"{path}: expected tensors, numbers and texts, found {_what(error)}") from error


def _what(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    found = _FOUND.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return f"a pickle that calls {found[1] or found[2]}" if found else "what torch cannot load as such"


def _check_latest(path: Path) -> None:
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    if Path(name).name != name or name == "..":
        raise UserError(f"{path}: expected the name of a folder beside it, found {name!r}")
