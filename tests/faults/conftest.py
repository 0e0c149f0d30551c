"""Fixtures and hooks of the campaign; what they do is in trials.py, which tests import."""

from trials import campaign, disk, pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown

__all__ = ["campaign", "disk", "pytest_sessionfinish", "pytest_terminal_summary", "pytest_testnodedown"]
