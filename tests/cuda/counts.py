"""What the pretend device saw: faults, synchronisations, copies and kernels, by phase."""

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

NO_PHASE = "-"


class Counts:
    """Counted as a program runs. Autograd's threads count, too."""

    def __init__(self) -> None:
        self.phase = NO_PHASE
        self.faults: Counter[tuple[str, str, str]] = Counter()  # (phase, what, where)
        self.syncs: Counter[tuple[str, str, str]] = Counter()
        self.copies: Counter[tuple[str, str, str]] = Counter()
        self.kernels: Counter[tuple[str, str]] = Counter()  # (phase, operation)
        self.calls: Counter[tuple[str]] = Counter()  # (label): how often something was done
        self._lock = threading.Lock()

    def note(self, table: Counter, what: str) -> None:
        """One more in a table of faults, synchronisations or copies."""
        with self._lock:
            table[self.phase, what, where()] += 1

    def kernel(self, operation: str) -> None:
        """One more launch."""
        with self._lock:
            self.kernels[self.phase, operation] += 1

    def call(self, label: str, times: int = 1) -> None:
        """Something was done once more."""
        with self._lock:
            self.calls[(label,)] += times

    def n_kernels(self) -> int:
        """Launches so far."""
        with self._lock:
            return sum(self.kernels.values())

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        tables = {name: getattr(self, name) for name in ("faults", "syncs", "copies", "kernels", "calls")}
        return {name: [[*key, n] for key, n in sorted(table.items())] for name, table in tables.items()}


_NOW = Counts()


def now() -> Counts:
    """What counts at this moment."""
    return _NOW


def fresh() -> Counts:
    """Begin to count anew."""
    global _NOW
    _NOW = Counts()
    return _NOW


@contextlib.contextmanager
def phase(label: str) -> Iterator[None]:
    """What happens inside the block is counted under this label; the innermost block's counts."""
    counts, before = _NOW, _NOW.phase
    counts.phase = label
    counts.call(label)
    try:
        yield
    finally:
        counts.phase = before


def labelled(owner: Any, name: str, label: str) -> None:
    """Let a method count under a label from now on. A name that is not there is an error: it was renamed."""
    inner = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        with phase(label):
            return inner(*args, **kwargs)

    setattr(owner, name, outer)


def where() -> str:
    """The nearest line of the project, and the nearest one of another library, if that is below it."""
    frame, other = sys._getframe(1), None
    while frame:
        path = frame.f_code.co_filename
        if "/rlhf/" in path and "site-packages" not in path:
            own = f"{path[path.rindex('/rlhf/') + 1 :]}:{frame.f_lineno}"
            return own if other is None else f"{own} < {other}"
        ours = "/tests/cuda/" in path and not path.endswith("scenarios.py")
        if other is None and "/torch/" not in path and not path.startswith("<") and not ours:
            other = f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return other or "backward"  # autograd's own thread has no lines


@dataclass(frozen=True)
class Report:
    """Of one scenario on one rank."""

    name: str
    end: str  # "ok", or what it failed with
    faults: list[list[Any]]  # [phase, what, where, how often]
    syncs: list[list[Any]]
    copies: list[list[Any]]
    kernels: list[list[Any]]  # [phase, operation, how often]
    calls: list[list[Any]]  # [label, how often]: phases that were entered, and what else scenarios count
    facts: dict[str, Any] = field(default_factory=dict)  # what the scenario says of itself
    said: str = ""  # what it printed last

    def n_syncs(self, phase: str | None = None, what: str = "") -> int:
        """How often the host waited, in a phase, or in all."""
        return _total(self.syncs, phase, what)

    def n_copies(self, phase: str | None = None, what: str = "") -> int:
        """Copies between host and device, those that the host waits for included."""
        return _total(self.copies, phase, what)

    def n_kernels(self, phase: str | None = None) -> int:
        """Launches in a phase, or in all."""
        return _total(self.kernels, phase, "")

    def n_calls(self, label: str) -> int:
        """How often a phase was entered."""
        return sum(n for name, n in self.calls if name == label)

    @property
    def phases(self) -> list[str]:
        """In alphabetical order."""
        return sorted({row[0] for row in [*self.syncs, *self.kernels]} - {NO_PHASE})

    def lines(self, *tables: str) -> str:
        """The tables for people, where a test fails."""
        rows = [row for name in tables or ("faults", "syncs") for row in getattr(self, name)]
        return "\n".join(" | ".join(map(str, row)) for row in rows)


def _total(rows: list[list[Any]], phase: str | None, what: str) -> int:
    return sum(row[-1] for row in rows if phase in (None, row[0]) and what in row[1])
