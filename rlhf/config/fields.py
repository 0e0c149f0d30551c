"""Fields of settings: their help texts, and checks of their values. Free of torch, so that `--help` is quick."""

from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

_LONGEST_NAME = 200  # file systems take 255 bytes


def help_text(text: str, default: Any = None) -> Any:
    """A dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": text})


def help_list(text: str, *default: str) -> Any:
    """A dataclass field that holds a list, with a help text for the command line."""
    return field(default_factory=lambda: list(default), metadata={"help": text})


def changed_settings(*parts: Any) -> list[str]:
    """Names of the fields of these settings (dataclasses) whose values differ from their defaults, in their order."""
    return [one.name for part in parts for one in fields(part) if _differs(getattr(part, one.name), _default(one))]


def _differs(value: Any, default: Any) -> bool:
    """Whether a value is not the default; None, an empty text and nested settings at their defaults are one."""
    if is_dataclass(value) and not isinstance(value, type) and default is None:
        return bool(value != type(value)())
    empty = [x is None or (isinstance(x, str | list | tuple | dict) and not x) for x in (value, default)]
    return bool(value != default) and not all(empty)


def _default(one: Field[Any]) -> Any:
    if one.default_factory is not MISSING:
        return one.default_factory()
    return None if one.default is MISSING else one.default


def check(settings: Any, holds: Callable[[Any], bool], expected: str, *names: str) -> None:
    """A UserError for the first of these fields whose value does not hold; None is always valid."""
    for name in names:
        found = getattr(settings, name)
        if found is not None and not holds(found):
            raise UserError(f"{name}: expected {expected}, found {found}")


def at_least(settings: Any, least: int, *names: str) -> None:
    """A UserError for the first of these fields that is smaller or nan."""
    check(settings, lambda x: x >= least, f"at least {least}", *names)


def check_plain_name(field_name: str, name: str) -> None:
    """A UserError for a name that cannot be that of one folder."""
    plain = name.isprintable() and Path(name).name == name != ".." and len(name.encode(errors="replace"))
    plain = 0 if name.startswith("-") else plain  # it would be an option on a command line
    if not plain or plain > _LONGEST_NAME:
        raise UserError(f"{field_name}: expected a plain folder name, found {name[:_LONGEST_NAME]!r}")


def check_seeds(settings: Any, *names: str) -> None:
    """A UserError for a seed that numpy does not accept."""
    check(settings, lambda x: 0 <= x < 2**32, "a number from 0 to 4294967295", *names)
