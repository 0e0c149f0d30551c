"""A run's steps as rows: a few of them for good, and on a terminal a bar with the newest numbers."""

import math
import time
from collections.abc import Sequence
from typing import Any

from rlhf.console import screen
from rlhf.console.words import clock

ROWS = 6  # about so many rows stay of a short run

SLOW = 60  # seconds: steps that take longer are all shown


class Steps:
    """Rows under a head of column names. The first step, the last one, and steps at even distances are printed."""

    def __init__(self, columns: Sequence[str], total: int, first: int = 0, rows: int = ROWS) -> None:
        """columns: names, as wide as their cells at least. first: steps that an earlier run has done."""
        self.columns, self.total = list(columns), total
        self.every = max(1, math.ceil((total - first) / max(1, rows - 1))) if rows else 0
        self.done, self.shown, self.when = first, -1, -math.inf
        self.bar: Any = None

    def start(self) -> None:
        """Show the bar, on a terminal."""
        if screen.is_live() and self.bar is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            text = TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[now]}")
            parts = (TextColumn("     "), BarColumn(bar_width=24), text, TimeElapsedColumn())
            self.bar = Progress(*parts, refresh_per_second=2, **screen.live_options())
            self.bar.add_task("", total=self.total, now="")
            self.bar.start()
            screen.on_error.append(self.close)

    def step(self, done: int, now: str = "") -> None:
        """So many steps are done. now: what the bar says."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, now=now)

    def advance(self, by: int, now: str = "") -> None:
        """So many steps more are done."""
        self.done = min(self.done + by, self.total)
        self.step(self.done, now)

    def row(self, step: int, cells: Sequence[str]) -> None:
        """A step's numbers; cells as many as columns."""
        if self.bar is not None:
            pairs = zip(self.columns[1:3], cells[1:3], strict=False)
            self.step(step, "   ".join(f"{name.split(' ±')[0].strip()} {cell}" for name, cell in pairs))
        now = time.monotonic()
        due = step >= self.total or self.shown < 0 or (step % self.every == 0 if self.every else False)
        if self.every and step != self.shown and (due or now - self.when > SLOW):
            if self.shown < 0:
                screen.note(self._line(self.columns))
            screen.note(self._line(cells))
            self.shown, self.when = step, now

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _line(self, cells: Sequence[str]) -> str:
        return "   ".join(f"{cell:>{len(name)}}" for name, cell in zip(self.columns, cells, strict=True))


class Pace:
    """Time left, from the steps so far. The first one warms up and counts only until there is another."""

    def __init__(self, total: int) -> None:
        self.total, self.times = total, list[float]()

    def left(self, step: int, seconds: float) -> str:
        """After a step that took so many seconds."""
        self.times.append(seconds)
        counted = self.times[1:] or self.times
        return clock((self.total - step) * sum(counted) / len(counted))
