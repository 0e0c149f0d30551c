"""The engine files: settings of `accelerate launch`, part of the package."""

from pathlib import Path

from rlhf.errors import UserError, did_you_mean

ENGINES = Path(__file__).resolve().parents[1] / "accelerate_configs"


def engine_file(name: str) -> Path:
    """The file of an engine; a UserError names those that there are."""
    known = {path.stem: path for path in sorted(ENGINES.glob("*.yaml"))}
    if name not in known:
        raise UserError(f"engine: expected one of {', '.join(known)}, found {name!r}{did_you_mean(name, known)}")
    return known[name]
