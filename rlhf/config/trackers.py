"""The trackers in `report_to`. One that is unknown or not installed is a UserError."""

from collections.abc import Sequence
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from rlhf.errors import UserError

# Tracker -> name of its package on PyPI if that differs.
_PACKAGES = {"comet_ml": "comet-ml"}


def tracker_names(report_to: str | Sequence[str] | None) -> list[str]:
    """The trackers to log to; `none` means none, `all` means those that are installed."""
    asked: list[Any] = [report_to] if isinstance(report_to, str) else list(report_to or [])
    installed = [LoggerType(tracker).value for tracker in get_available_trackers()]
    if asked in (["all"], ["none"], [None]):
        return installed if asked == ["all"] else []
    builtin = {LoggerType(kind).value for kind in LoggerType} - {"all"}
    for name in asked:
        if name not in builtin and name not in LOGGER_TYPE_TO_CLASS:  # it also holds trackers that users registered
            known = ", ".join(sorted(builtin))
            raise UserError(f"report_to: expected none, all, or a list of {known}, found {name!r}")
        if name in builtin and name not in installed:
            package = _PACKAGES.get(name, name)
            raise UserError(f"report_to: {name} is not installed: pip install {package}")
    return asked
