"""Numbers, times and paths as the report writes them: one style everywhere."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2.runtime import Undefined

from rlhf.reporting.values import is_number

_ABSOLUTE = re.compile(r"""(?<![\w.:/~…-])~?/(?:[^\s/'"=,]+/)+""")


def num(value: Any, digits: int = 3) -> str:
    """Format a number: 1,234 or `digits` decimals, small ones with 3 significant digits; "–" for a missing one."""
    if not is_number(value):
        return "–" if value is None or isinstance(value, Undefined) else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:,.{digits}f}"


def signed(value: Any) -> str:
    """The same with a plus sign for what is above 0."""
    return ("+" if is_number(value) and value > 0 else "") + num(value)


def percent(value: Any) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f}%" if is_number(value) else num(value)


def duration(seconds: Any) -> str:
    """Seconds as 1.2 s, 3 min 05 s or 2 h 07 min."""
    if not is_number(seconds) or seconds < 60:
        return num(seconds, 1) + (" s" if is_number(seconds) else "")
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def ends(interval: Sequence[Any] | None, form: Any = num) -> str:
    """An interval as [low, high]; "–" without one."""
    return f"[{form(interval[0])},\u00a0{form(interval[1])}]" if interval else "–"  # never broken inside


def with_ends(value: Any, interval: Sequence[Any] | None, form: Any = num) -> str:
    """A value and its interval, if it has one."""
    return f"{form(value)} {ends(interval, form)}" if interval else str(form(value))


def short(value: Any) -> str:
    """A text without the folders of absolute paths, which say nothing elsewhere: /home/me/a.yaml is …/a.yaml."""
    return _ABSOLUTE.sub("…/", str(value))


def flat(record: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield ("outer.inner", value) for each leaf of a nested record, in its order."""
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, (*prefix, str(key)))
        else:
            yield ".".join((*prefix, str(key))), value
