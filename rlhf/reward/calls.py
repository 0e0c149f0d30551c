"""Calls of a user's reward function: what it is passed, async ones beside everything else, and what it may return."""

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError

_NOT_ROWS = (str, bytes, Mapping, Set)  # have a length and can be iterated, but are no list of scores


@dataclass
class Logged:
    """What reward functions log about one batch, by TRL's `log_metric` and `log_extra`."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)  # one value per response

    def metric(self, name: str, value: Any) -> None:
        """A number of this batch; one that is not finite (the mean of nothing, say) is left out."""
        if math.isfinite(value := float(value)):
            self.metrics.setdefault(name, []).append(value)

    def extra(self, column: str, values: Iterable[Any], count: int, reward: str) -> None:
        """A value per response, for samples.jsonl and completions.jsonl."""
        found = [_plain(value) for value in values]
        if len(found) != count:
            raise UserError(f"reward {reward}: log_extra({column!r}): expected {count} values, found {len(found)}")
        self.columns[column] = found

    def row(self, i: int) -> dict[str, Any]:
        """What is logged about response i."""
        return {column: values[i] for column, values in self.columns.items() if i < len(values)}


def _plain(value: Any) -> Any:
    """A value that JSON has."""
    value = value.item() if getattr(value, "shape", None) == () else value
    return value if isinstance(value, str | bool | int | float | None) else str(value)


def accepted(name: str, function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function's signature takes.

    A UserError if it needs one that is not there.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions in C have none
        return dict(given)
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    unnamed = [one.name for one in parameters if one.kind is one.POSITIONAL_ONLY and one.default is one.empty]
    if unnamed:
        raise UserError(f"reward {name}: the function takes {unnamed[0]!r} by position, but arguments come by name")
    missing = [one.name for one in named if one.default is one.empty and one.name not in given]
    if missing:
        raise UserError(
            f"reward {name}: the function takes {missing[0]!r}, but the rows of prompts have no such column; "
            f"there are {', '.join(given)}"
        )
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return dict(given)
    return {one.name: given[one.name] for one in named if one.name in given}


def call(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Call the function; what is returned waits for its result. An async function runs until then in the background."""
    with _of(name):
        found = function(**arguments)
    if not inspect.isawaitable(found):
        return lambda: found
    future = _in_background(found)

    def result() -> Any:
        with _of(name):
            try:
                return future.result()
            finally:
                future.cancel()  # where Ctrl-C has ended the wait

    return result


@contextmanager
def _of(name: str) -> Iterator[None]:
    """Errors inside the block say which reward they are of."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in reward {name}")
        raise


def _in_background(found: Awaitable[Any]) -> "Future[Any]":
    async def wait() -> Any:
        return await found

    return asyncio.run_coroutine_threadsafe(wait(), _loop())


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for the whole run, since clients of remote services belong to the loop that first used them.

    It has a thread of its own: in a notebook the main thread has a loop already.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop


def as_scores(name: str, found: Any, count: int) -> Tensor:
    """What a function returns for `count` responses -> float32 [count]; None is NaN, and NaN is inf.

    A list, tuple, array or tensor [count] or [count, 1], of any type; for one response a bare number, too. A UserError
    that names the function for anything else.
    """
    with _of(name):  # a generator computes here
        values = _values(found)
    if values is None:
        what = "None; does it return?" if found is None else f"{type(found).__name__} {found!r:.60}"
        raise UserError(f"reward {name}: expected {count} numbers, one per completion, found {what}")
    if len(values) != count:
        raise UserError(f"reward {name}: expected {count} numbers, found {len(values)}")
    return torch.tensor([_number(name, value, i) for i, value in enumerate(values)], dtype=torch.float32)


def _values(found: Any) -> list[Any] | None:
    """A list of what may be scores; None if it is no list of anything."""
    if hasattr(found, "tolist") and hasattr(found, "shape"):  # of torch, numpy and others
        shape = tuple(found.shape)
        found = (found.reshape(-1) if len(shape) == 2 and shape[1] == 1 else found).tolist()
    if isinstance(found, bool | int | float):
        return [found]
    if isinstance(found, _NOT_ROWS) or not isinstance(found, Iterable):
        return None
    return list(found)


def _number(name: str, value: Any, i: int) -> float:
    if value is None:
        return math.nan
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise UserError(
            f"reward {name}: expected a number or None for each completion, found {type(value).__name__} "
            f"{value!r:.60} for completion {i}"
        ) from None
    # NaN stands for None from here on, so a NaN that is an error becomes inf, which is not finite either.
    return math.inf if math.isnan(number) else number
