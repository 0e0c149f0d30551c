"""Workers on one or several CPU processes, plain or under DeepSpeed, for tests that hold one against the other."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from forge import Forge, ranks, said
from limits import HANG

TESTS = Path(__file__).parent
LIMIT = HANG
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
# Ranks that went without it would agree all the better.
kind = {"ddp": "", "fsdp2": "FSDP"}.get(os.environ["WORKER_ENGINE"], "DEEPSPEED")
found = run.accelerator.distributed_type.value
assert found == kind or not kind and found not in ("FSDP", "DEEPSPEED"), found
run.accelerator.wait_for_everyone()
sys.stdout.flush()
os._exit(0)
"""


def launch(
    folder: Path, worker: str, options: dict[str, Any], processes: int = 1, engine: str = "ddp", fresh: bool = False
) -> str:
    """Run a worker in its folder; returns what it printed. engine: ddp, or the name of a file in accelerate_configs.

    options: of `tiny_ppo.trainer`, and whatever else the worker takes out of them. fresh: one process that shares
    nothing with another, not even the seed of Python's hashes. The time limit is part of each test: ranks that
    disagree on the number of collectives wait for one another for ever.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script, argv = folder / "worker.py", [json.dumps({"folder": str(folder)} | options)]
    script.write_text(BEGIN + worker + END)
    return _alone(script, argv) if fresh else run(script, argv, processes, engine)


def run(
    script: Path,
    argv: list[Any],
    processes: int = 1,
    engine: str = "ddp",
    folder: Path | None = None,
    as_shipped: bool = False,
) -> str:
    """Run a file, or a script that the forge has, on each rank; returns what they printed, which goes to the folder.

    as_shipped: ZeRO-3 as accelerate_configs has it, which leaves small parameters whole on every rank.
    """
    logs = [(folder or script.parent) / f"said-by-{rank}" for rank in range(processes)]
    for log in logs:
        for end in (".out", ".err"):
            log.with_suffix(end).unlink(missing_ok=True)
    by_rank = zip(logs, environments(engine, processes, as_shipped), strict=True)
    told = _clean() | {"WORKER_ENGINE": engine}
    pids = [forge().start(str(script), argv, log, **told | given) for log, given in by_rank]
    codes: list[int | None] = []
    for pid in pids:
        failed = any(code != 0 for code in codes)
        codes.append(forge().wait(pid, 5 if failed else LIMIT))  # who waits for that rank would wait to the limit
    assert codes == [0] * processes, f"{codes}: " + "\n".join(said(log)[-3000:] for log in logs)
    return "".join(log.with_suffix(".out").read_text() for log in logs)


@functools.cache
def forge() -> Forge:
    made = Forge()
    atexit.register(made.close)
    return made


def python(
    command: list[str], env: dict[str, str], cwd: Path, limit: float = LIMIT, typed: str = ""
) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` in a fork that has torch, but imports transformers and whatever is above it itself."""
    with tempfile.TemporaryDirectory() as folder:
        return forge().process(command, env, cwd, Path(folder) / "log", limit, typed)


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}


def _alone(script: Path, argv: list[str]) -> str:
    paths = f"{TESTS}{os.pathsep}{TESTS.parent}"
    changes = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "WORKER_ENGINE": "ddp"}
    command, env = [sys.executable, str(script), *argv], _clean() | changes
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def environments(engine: str, processes: int, as_shipped: bool = False) -> list[dict[str, Any]]:
    """Of each rank, with a port that is free now."""
    if engine == "ddp":  # ACCELERATE_USE_CPU would turn DeepSpeed off
        given = {"ACCELERATE_USE_CPU": "true"}
        return [given | rank for rank in ranks(processes)] if processes > 1 else [given]
    return [_launched(engine, processes, as_shipped) | rank for rank in ranks(processes)]


@functools.cache
def _launched(engine: str, processes: int, as_shipped: bool) -> dict[str, str]:
    """What `accelerate launch` with this engine puts into the environment of its processes, asked of itself."""
    folder = Path(tempfile.mkdtemp(prefix="engine"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    script = folder / "tell.py"
    script.write_text("import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + os.environ['RANK'], 'w'))")
    command = ["-c", "from accelerate.commands.launch import main; main()", "--config_file"]
    command.append(str(_config(folder, engine, processes, as_shipped)))
    env = _clean() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    told = folder / "rank-"
    done = forge().process([*command, str(script), str(told)], env, Path.cwd(), folder / "log", LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(Path(f"{told}0").read_text())
    # The rest of torchrun's is of its own run: ranks meet at the port that they are given.
    return {name: found[name] for name in found.keys() - os.environ.keys() if not name.startswith("TORCHELASTIC")}


def rows(path: Path) -> list[Any]:
    """A .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _config(folder: Path, engine: str, processes: int, as_shipped: bool) -> Path:
    config = yaml.safe_load((TESTS.parent / "accelerate_configs" / f"{engine}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": processes, "main_process_port": 0}
    if engine.startswith("zero3") and not as_shipped:
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
