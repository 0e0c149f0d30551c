"""Where a run can be hit: in each phase, and at each thing that it does to a file. Lives in the forge's children."""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

PHASES = {
    "generate": ("rlhf.ppo.actor", "Actor", "sample"),
    "score": ("rlhf.ppo.actor", "Actor", "rollout"),
    "learn": ("rlhf.ppo.learner", "Learner", "learn"),
    "log": ("rlhf.runtime.tracking", "Recorder", "row"),
    "save": ("accelerate", "Accelerator", "save_state"),
    "begin": ("rlhf.runtime.run_folder", "Stage", "__init__"),
    "end": ("rlhf.ppo.trainer", "PPOTrainer", "throughput"),
    "model": ("rlhf.ppo.trainer", "PPOTrainer", "save_model"),
    "train": ("rlhf.reward.preference", "PreferenceTrainer", "training_step"),
    "evaluate": ("rlhf.reward.preference", "PreferenceTrainer", "evaluate"),
    "metrics": ("rlhf.reward.trainer", "MetricsFile", "on_log"),
    "seal": ("rlhf.runtime.sealing", "SealCheckpoint", "on_save"),
}
WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile"}
count = 0


def install(fault):
    """fault: None, or what to do, and where: phase and call, or the number of a file's change."""
    global count
    count = 0
    if fault is None:
        return
    if "clock" in fault:
        true = time.time
        time.time = lambda: true() - fault["clock"]
    if "phase" in fault:
        module, owner, name = PHASES[fault["phase"]]
        _before(getattr(importlib.import_module(module), owner), name, fault["call"], lambda: _act(fault))
    if "changes_of" in fault:
        sys.addaudithook(lambda event, given: _count(event, given, fault))


def finish(fault):
    """Leave the number of changes where it was asked for."""
    if fault and "tell" in fault:
        Path(fault["tell"]).write_text(str(count))


def _before(owner, name, call, act):
    inner, calls = getattr(owner, name), []

    def hit(*args, **options):
        calls.append(1)
        if len(calls) == call:
            act()
        return inner(*args, **options)

    setattr(owner, name, hit)


def _act(fault):
    if "signal" in fault:
        os.kill(os.getpid(), fault["signal"])
    if "fill" in fault:
        fill(Path(fault["fill"]), fault["leave"])


def fill(folder, leave):
    """Leave so many bytes free on the folder's disk."""
    with (folder / "filler").open("ab", buffering=0) as file:
        while (free := os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - leave) > 0:
            file.write(bytes(min(free, 1 << 20)))


def _count(event, given, fault):
    global count
    changes = event in WRITES or (event == "open" and (given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if not changes or not isinstance(given[0], str | bytes | os.PathLike):
        return
    if os.fsdecode(given[0]).startswith(fault["changes_of"]):
        count += 1
        if count == fault.get("at"):
            os.kill(os.getpid(), signal.SIGKILL)
