"""Compare what a run found with what was recorded of it."""

from typing import Any

import pytest


def different(found: Any, recorded: Any, rel: float = 1e-6, where: str = "") -> list[str]:
    """Where two records differ, and how."""
    if isinstance(found, dict) and isinstance(recorded, dict):
        pairs = {n: (found.get(n, "none"), recorded.get(n, "none")) for n in sorted(found.keys() | recorded.keys())}
    elif isinstance(found, list) and isinstance(recorded, list) and len(found) == len(recorded):
        pairs = dict(enumerate(zip(found, recorded, strict=True)))
    else:
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (found, recorded))
        close = pytest.approx(recorded, rel=rel, abs=rel / 100, nan_ok=True) if numbers else recorded
        return [] if found == close else [f"{where}: {recorded} -> {found}"]
    return [line for n, (a, b) in pairs.items() for line in different(a, b, rel, f"{where}/{n}")]
