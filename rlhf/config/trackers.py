"""The trackers in `report_to`. One that is unknown or not installed is a UserError."""

from collections.abc import Sequence, Set
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from rlhf.errors import UserError, did_you_mean

# Tracker -> name of its package on PyPI if that differs.
_PACKAGES = {"comet_ml": "comet-ml"}


def tracker_names(report_to: str | Sequence[str] | None) -> list[str]:
    """The trackers to log to; `none` means none, `all` means those that are installed."""
    asked: list[Any] = [report_to] if isinstance(report_to, str) else list(report_to or [])
    installed = [LoggerType(tracker).value for tracker in get_available_trackers()]
    if asked in (["all"], ["none"], [None]):
        return installed if asked == ["all"] else []
    builtin = {LoggerType(kind).value for kind in LoggerType} - {"all"}
    _check(asked, builtin, {*installed, *(name for name in LOGGER_TYPE_TO_CLASS if name not in builtin)})
    return asked


def check_integrations(report_to: str | Sequence[str] | None) -> None:
    """A UserError for a tracker that transformers' Trainer does not know, or that is not installed."""
    asked: list[Any] = [report_to] if isinstance(report_to, str) else list(report_to or [])
    if asked not in (["all"], ["none"], [None]):
        _check(asked, set(INTEGRATION_TO_CALLBACK), set(get_available_reporting_integrations()))


def _check(asked: Sequence[str], known: Set[str], there: Set[str]) -> None:
    """known: what the libraries name; there: what can be used, which may hold trackers that users registered."""
    for name in asked:
        if name not in known | there:
            meant = did_you_mean(name, [*known, "none", "all"])
            raise UserError(
                f"report_to: expected none, all, or a list of {', '.join(sorted(known))}, found {name!r}{meant}"
            )
        if name not in there:
            raise UserError(f"report_to: {name} is not installed: pip install {_PACKAGES.get(name, name)}")
