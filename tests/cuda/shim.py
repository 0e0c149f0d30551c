"""Compiles shim.cpp, once for each version of PyTorch and each user, and loads it into this process."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.cpp")
LIMIT = 180  # seconds for the compiler


def missing() -> str | None:
    """Why there can be no pretend device here; None where there can."""
    if not sys.platform.startswith("linux"):
        return "the pretend CUDA device needs Linux"
    if shutil.which("g++") is None:
        return "the pretend CUDA device needs g++, found none"
    if "+cpu" not in importlib.metadata.version("torch") and (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "the pretend CUDA device needs a CPU build of PyTorch: this one has CUDA of its own"
    return None


def load() -> None:
    """Into this process, before it imports torch, which asks at once whether there is CUDA."""
    assert "torch" not in sys.modules, "expected the pretend CUDA device before torch"
    ctypes.CDLL(str(library()))


def library() -> Path:
    """The compiled shim."""
    made_for = f"{importlib.metadata.version('torch')} in {_torch()}"
    key = hashlib.sha256(SOURCE.read_bytes() + made_for.encode()).hexdigest()[:16]
    target = _cache() / f"{key}.so"
    if not target.exists():
        aside = target.with_suffix(f".{os.getpid()}")
        lib = _torch() / "lib"
        command = ["g++", "-shared", "-fPIC", "-O0", "-std=c++20", f"-I{_torch()}/include", str(SOURCE), f"-L{lib}"]
        command += ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}", "-o", str(aside)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, done.stderr[-3000:]
        os.replace(aside, target)  # several may compile at once
    return target


def _torch() -> Path:
    """Where PyTorch is installed; it is not imported."""
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def _cache() -> Path:
    """A folder of this user's, which nobody else can write to."""
    folder = Path(tempfile.gettempdir()) / f"pretend-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="pretend-cuda-"))
    return folder
