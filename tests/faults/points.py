"""Where a run can be hit: in each phase, and at each thing that it does to a file. Lives in the forge's children."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PHASES = {
    "generate": ("rlhf.ppo.rollout", "RolloutCollector", "sample"),
    "score": ("rlhf.ppo.rollout", "RolloutCollector", "complete"),
    "learn": ("rlhf.ppo.learner", "Learner", "learn"),
    "log": ("rlhf.tracking.recorder", "Recorder", "row"),
    "save": ("accelerate", "Accelerator", "save_state"),
    "begin": ("rlhf.storage.run_folder", "Stage", "__init__"),
    "end": ("rlhf.ppo.trainer", "PPOTrainer", "throughput"),
    "model": ("rlhf.ppo.trainer", "PPOTrainer", "save_model"),
    "train": ("rlhf.reward.trainer", "PreferenceTrainer", "training_step"),
    "evaluate": ("rlhf.reward.trainer", "PreferenceTrainer", "evaluate"),
    "metrics": ("rlhf.reward.trainer", "MetricsFile", "on_log"),
    "seal": ("rlhf.reward.manifest_callback", "ManifestCallback", "on_save"),
}
WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile"}
changed = []  # paths, one for each change


def install(fault):
    """fault: None, or what to do, and where: phase and call, or the number of a file's change."""
    changed.clear()
    if fault is None:
        return
    if "blind" in fault:
        _blind(Path(fault["blind"]))
    if "clock" in fault:
        true = time.time
        time.time = lambda: true() - fault["clock"]
    if "phase" in fault:
        module, owner, name = PHASES[fault["phase"]]
        _before(getattr(importlib.import_module(module), owner), name, fault["call"], lambda: _act(fault))
    if "changes_of" in fault:
        sys.addaudithook(lambda event, given: _count(event, given, fault))


def _blind(folder):
    """As on a machine whose network file system does not show yet what is in the folder: nothing is there.

    A file can be opened all the same, which asks the server.
    """
    for name, nothing in (("exists", False), ("is_dir", False), ("is_file", False), ("glob", ()), ("iterdir", ())):
        _hide(name, nothing, folder)


def _hide(name, nothing, folder):
    look = getattr(Path, name)

    def blind(path, *args, **options):
        inside = path != folder and path.is_relative_to(folder)
        return nothing if inside else look(path, *args, **options)

    setattr(Path, name, blind)


def finish(fault):
    """Leave the changed paths where they were asked for; who was killed has done so."""
    if fault and "tell" in fault:
        Path(fault["tell"]).write_text("\n".join(changed))


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
    if "read_only" in fault:
        read_only(Path(fault["read_only"]))


def read_only(folder):
    """From now on nothing in the folder can be opened for writing, made, renamed or removed.

    For root no permission is a bar, so that the folder is mounted over itself; raises where that is not allowed.
    """
    if os.geteuid():
        for path in [folder, *filter(Path.is_dir, folder.rglob("*"))]:
            path.chmod(0o555)
    else:
        for options in (["--bind", str(folder)], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)


def writable(folder):
    """After `read_only`; harmless without it."""
    if os.geteuid():
        for path in [folder, *filter(Path.is_dir, folder.rglob("*"))]:
            path.chmod(0o755)
    else:
        subprocess.run(["umount", str(folder)], check=False, capture_output=True)


def fill(folder, leave):
    """Leave so many bytes free on the folder's disk."""
    with (folder / "filler").open("ab", buffering=0) as file:
        while (free := os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - leave) > 0:
            file.write(bytes(min(free, 1 << 20)))


def _count(event, given, fault):
    changes = event in WRITES or (event == "open" and (given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if not changes or not isinstance(given[0], str | bytes | os.PathLike):
        return
    if os.fsdecode(given[0]).startswith(fault["changes_of"]):
        changed.append(os.fsdecode(given[0]))
        if len(changed) == fault.get("at"):
            finish(fault)
            os.kill(os.getpid(), signal.SIGKILL)
