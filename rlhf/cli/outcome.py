"""The first and the last lines of a pipeline: what will run, and what came out of it."""

import os
from importlib import metadata
from pathlib import Path

from rlhf.console import screen
from rlhf.console.words import path_to


def show_header(recipe: str, engine: str, processes: int, folder: Path) -> None:
    """What will run, and on what."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    what = f"rlhf {metadata.version('rlhf')}  {Path(recipe).name} on {engine}, {memory:.0f} GB"
    screen.say(f"{what}   logs: {path_to(folder / 'logs')}")


def show_outcome(folder: Path) -> None:
    """What PPO did, from the run's files, and what to open next."""
    report = folder / "report" / "report.html"
    screen.say(f"Report  {path_to(report)} (.pdf, .ipynb)     Next  tensorboard --logdir {path_to(folder)}")
