"""The first and the last lines of a pipeline: what will run, and what came out of it."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rlhf import __version__
from rlhf.config import RunConfig
from rlhf.console import quiet, screen
from rlhf.console.words import clock, interval, path_to, plain, quoted, signed
from rlhf.reporting.conclusions import verdict
from rlhf.reporting.values import NAMES
from rlhf.storage.basis import report_page
from rlhf.storage.disk import read_json
from rlhf.storage.stages import POLICIES, read_run


def show_header(what: str, on: list[str], folder: Path, time: str = "") -> None:
    """What will run, on what, and how long it may take."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    where = ", ".join([*on, f"{memory:.0f} GB"])
    logs = "" if quiet.is_dropped() else f"logs: {path_to(folder / 'logs')}"
    screen.say("   ".join(filter(None, [f"rlhf {__version__}  {what} on {where}", time, logs])), "bold")
    screen.say()


def show_outcome(run: RunConfig) -> None:
    """What PPO did, from the run's files, and what to open next."""
    folder = run.folder()
    evaluation: Any = read_json(folder / "evaluation" / "evaluation.json")
    screen.say()
    if found := verdict(evaluation):
        rows = [["", "before", "after", "gain", f"[{evaluation.get('confidence', 0.95):.0%}]", "KL/token", "time", ""]]
        for name, words in found.words.items():
            gain, model = evaluation["gains"][name], evaluation["models"].get(name, {})
            seconds = read_run(folder / POLICIES[name]).get("seconds") if name in POLICIES else None
            kl = model.get("kl_per_token")
            rows.append(
                [
                    NAMES.get(name, name),
                    plain(gain["before"]),
                    plain(gain["after"]),
                    signed(gain["gain"]),
                    interval(*gain["interval"]),
                    "" if kl is None else plain(kl, 3),
                    "" if seconds is None else clock(seconds),
                    words,
                ]
            )
        screen.say(screen.table(rows, "<>>>>>><", 2))
        screen.say()
        for line in (found.headline, *found.advice):
            screen.say(line)
        screen.say()
    where = ["--run", quoted(run.run)]
    if path_to(Path(run.runs_dir)) != RunConfig.runs_dir:
        where += ["--runs_dir", path_to(Path(run.runs_dir))]
    report = report_page(folder)
    others = ", ".join(end for end in (".pdf", ".ipynb") if report.with_suffix(end).exists())
    screen.to_copy(f"Report  {path_to(report)}{f' ({others})' if others else ''}")
    screen.to_copy(f"Curves  {_command('tensorboard')} --logdir {path_to(folder)}")
    if (folder / "evaluation").is_dir():
        ours = _command("rlhf")
        screen.to_copy(f"Next    {' '.join([ours, 'compare', *where])}")
        screen.to_copy(f"        {' '.join([ours, 'rate sheet', *where])}")


def _command(name: str) -> str:
    """A program as the person can call it: by its name, or by its path where the shell would not find it."""
    ours = Path(sys.prefix) / "bin" / name
    found = shutil.which(name, path=os.environ.get("RLHF_SHELL_PATH"))
    return name if not ours.exists() or (found and Path(found).samefile(ours)) else path_to(ours)
