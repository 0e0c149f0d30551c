"""Workers on one or several CPU processes, plain or under DeepSpeed, for tests that hold one against the other."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

TESTS = Path(__file__).parent
# A file of one's own, since DeepSpeed leaves parameters as small as these whole on every rank.
ZERO3 = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_gather_16bit_weights_on_model_save": True,
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
# First and last lines of every worker, whose trainer is called run. Nothing is torn down: at exit DeepSpeed sometimes
# aborts although all is done.
BEGIN = """
import json, os, sys
from pathlib import Path
import torch
from tiny_ppo import timeless, trainer
options = json.loads(sys.argv[1])
folder = Path(options["folder"])
"""
END = """
run.accelerator.wait_for_everyone()
sys.stdout.flush()
os._exit(0)
"""


def launch(folder: Path, worker: str, options: dict[str, Any], processes: int = 1, engine: str = "ddp") -> str:
    """Run a worker in its folder; returns what it printed. engine: ddp, or the name of a file in accelerate_configs.

    options: of `tiny_ppo.trainer`, and whatever else the worker takes out of them. The time limit is part of each
    test: ranks that disagree on the number of collectives wait for one another for ever.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "worker.py"
    script.write_text(BEGIN + worker + END)
    command, changes = [sys.executable], {"ACCELERATE_USE_CPU": "true"}
    if engine != "ddp":  # ACCELERATE_USE_CPU would turn DeepSpeed off
        command += ["-m", "accelerate.commands.launch", "--config_file", str(_config(folder, engine, processes))]
        changes = {"DS_ACCELERATOR": "cpu"}
    elif processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    clean = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    done = subprocess.run(
        [*command, str(script), json.dumps({"folder": str(folder)} | options)],
        env=clean | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"} | changes,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(path: Path) -> list[Any]:
    """A .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _config(folder: Path, engine: str, processes: int) -> Path:
    config = yaml.safe_load((TESTS.parent / "accelerate_configs" / f"{engine}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": processes, "main_process_port": 0}
    if engine.startswith("zero3"):
        deepspeed = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": ZERO3 | (OFFLOAD if engine == "zero3_offload" else {}),
        }
        if (
            engine == "zero3_offload"
        ):  # else it would take no SGD, whose steps alone can be held against another engine's
            deepspeed["zero_force_ds_cpu_optimizer"] = False
        (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
        config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "deepspeed.json")}
        del config["mixed_precision"]  # in the file's competence, then
    path = folder / "engine.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
