"""A long run takes no more of the machine at its end than near its beginning."""

import json

import numpy as np
import pytest
from workers import launch, rows

STEPS, WARM, EVERY, KEPT = 300, 30, 20, 2
# What the process holds after each step, and what lies on the disk just after a checkpoint.
WORKER = """
import resource
import threading
from transformers import TrainerCallback

page = resource.getpagesize()

def held():
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * page
    return memory, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), threading.active_count()

class Look(TrainerCallback):
    def __init__(self):
        self.rows, self.disk = [], []

    def on_step_end(self, args, state, control, **_):
        self.rows.append(held())

    def on_save(self, args, state, control, **_):
        files = [path for path in folder.rglob("*") if path.is_file()]
        states = [path for path in files if "checkpoints" in path.parts and path.suffix not in (".json", ".jsonl")]
        saved = sum(path.stat().st_size for path in states)
        self.disk.append((saved, sum(path.stat().st_size for path in files) - saved))

look = Look()
run = trainer(**options)
run.add_callback(look)
run.train()
(folder / "look.json").write_text(json.dumps({"rows": look.rows, "disk": look.disk}))
"""
OPTIONS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": EVERY,
    "save_total_limit": KEPT,
    "report_to": "tensorboard",
}


@pytest.mark.slow
def test_memory_files_threads_and_disk_stay_as_they_are(tmp_path):
    launch(tmp_path, WORKER, OPTIONS, fresh=True)
    look = json.loads((tmp_path / "look.json").read_text())
    assert len(look["rows"]) == STEPS
    memory, files, threads, known = np.array(look["rows"])[WARM:].T
    slope = np.polyfit(np.arange(len(memory)), memory, 1)[0]
    grown = slope * len(memory) / memory.mean()
    saved, logs = np.array(look["disk"]).T  # weights and states in checkpoints; rows of all steps, here and there
    print(f"memory {memory[0] / 2**20:.1f} to {memory[-1] / 2**20:.1f} MiB, trend {grown:.3%}; disk {saved} and {logs}")
    assert grown < 0.01  # what the allocator gives back is no leak
    # TensorBoard's own thread opens its file for the moment of a flush, so single steps may see one more.
    assert np.median(files[-WARM:]) == np.median(files[:WARM]) == files.min()
    assert np.ptp(files) <= 1
    assert np.ptp(threads) == np.ptp(known) == 0
    assert len(saved) == STEPS // EVERY
    # As one is written there are KEPT older ones, of which one goes.
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step}" for step in (STEPS - EVERY, STEPS)]
    assert saved.max() <= saved[KEPT - 1] * 1.01
    # Bytes a step: a row of metrics in the folder and, twice, in each checkpoint, and what TensorBoard makes of it.
    assert logs.max() < STEPS * 20_000
    assert len(rows(tmp_path / "metrics.jsonl")) == STEPS
