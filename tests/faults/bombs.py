"""Files that would run a command, were they loaded as they ask for: it leaves a marker, and does nothing else."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch

CODE = "from pathlib import Path\nPath({marker!r}).write_text('ran')\n"


class Bomb:
    """Unpickled by plain pickle, it makes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return (open, (self.marker, "w"))


def torch_bomb(path: Path, marker: Path, **beside: Any) -> None:
    """As torch.save writes it, among tensors."""
    torch.save({"weight": torch.zeros(2, 2), "bomb": Bomb(marker)} | beside, path)


def plain_bomb(path: Path, marker: Path) -> None:
    """As pickle.dump writes it."""
    path.write_bytes(pickle.dumps(Bomb(marker), protocol=2))


def add_code(folder: Path, file: str, marker: Path, entry: dict[str, Any], name: str = "evil.py") -> None:
    """A Python file in a model's folder, and in one of its JSON files what leads to it."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(CODE.format(marker=str(marker)))
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | entry))
