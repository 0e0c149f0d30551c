"""A process that has imported everything once, with the shim before it, and forks a child for each scenario.

    device = PretendCuda()
    report = device.run("ppo", lora=True, layers=4)        # options of the scenario
    one, two = device.run_ranks("ppo", 2)
    device.close()

As a script it is that process.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import counts
import shim
from counts import Report

ROOT = Path(__file__).parents[2]
LIMIT = 120  # seconds of one scenario
START = 300  # seconds until all is imported, the compiler included


class PretendCuda:
    """The process, as tests use it."""

    def __init__(self) -> None:
        paths = [str(ROOT / folder) for folder in (".", "tests", "tests/cuda", "scripts")]
        changes = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        clean = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("ACCELERATE_", "SLURM_", "TENSORBOARD_", "CUDA_")) and k not in ("RANK", "LOCAL_RANK")
        }
        self._folder = tempfile.TemporaryDirectory(prefix="pretend-cuda-runs-")
        self._n = 0
        shim.library()  # its failure is one of the test that asked
        command = [sys.executable, __file__]
        self._server = subprocess.Popen(
            command, env=clean | changes, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, scenario: str, /, limit: float = LIMIT, cpu: bool = False, **options: Any) -> Report:
        """What came of a scenario, in a process of its own; past the limit it is killed. cpu: without the device."""
        [report] = self.run_ranks(scenario, 1, limit=limit, cpu=cpu, **options)
        return report

    def run_ranks(
        self, scenario: str, processes: int, /, limit: float = LIMIT, cpu: bool = False, **options: Any
    ) -> list[Report]:
        """The same on several ranks; one report each, in order."""
        self._n += 1
        folder = Path(self._folder.name) / str(self._n)
        request = {
            "scenario": scenario,
            "options": options,
            "processes": processes,
            "folder": str(folder),
            "limit": limit,
            "cpu": cpu,
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        assert self._server.stdout.readline(), "the process of the pretend CUDA device is gone"
        return [self._report(folder, scenario, rank) for rank in range(processes)]

    def _report(self, folder: Path, scenario: str, rank: int) -> Report:
        said = (folder / f"said-{rank}").read_text(errors="replace")[-6000:]
        path = folder / f"report-{rank}.json"
        if not path.exists():
            return Report(scenario, "killed, or ended without a report", [], [], [], [], [], said=said)
        return Report(scenario, **json.loads(path.read_text()), said=said)

    def close(self) -> None:
        """End the process."""
        self._server.stdin.close()
        try:
            self._server.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._server.stdout.close()
        self._folder.cleanup()


def serve() -> None:
    """Requests as JSON lines come in, an answer goes out when all children of one have ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    shim.load()
    import nccl  # noqa: F401  before the children need it
    import pretend  # noqa: F401
    import scenarios

    scenarios.prepare()
    gc.collect()
    gc.freeze()  # a child that collects garbage would copy all of the memory
    for line in sys.stdin:
        request = json.loads(line)
        Path(request["folder"]).mkdir(parents=True)
        _answer(request)
        answers.write("done\n")
        answers.flush()


def _answer(request: dict[str, Any]) -> None:
    environments: list[dict[str, Any]] = [{}]
    if request["processes"] > 1:
        import forge

        environments = forge.ranks(request["processes"])
    pids = [_fork(request, rank, env) for rank, env in enumerate(environments)]
    end = time.monotonic() + request["limit"]
    while pids and time.monotonic() < end:
        pids = [pid for pid in pids if not os.waitpid(pid, os.WNOHANG)[0]]
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _fork(request: dict[str, Any], rank: int, env: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        folder = Path(request["folder"])
        os.dup2(os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        os.environ.update({name: str(value) for name, value in env.items()})
        found = _run(request, folder)
        (folder / f"aside-{rank}").write_text(json.dumps(found))
        os.replace(folder / f"aside-{rank}", folder / f"report-{rank}.json")
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _run(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    import scenarios
    from pretend import pretend

    device = contextlib.nullcontext(counts.now()) if request["cpu"] else pretend()
    if request["processes"] > 1:
        import nccl

        nccl.join(request["limit"])
    end, facts = "ok", None
    with device as found:
        try:
            facts = scenarios.SCENARIOS[request["scenario"]](folder, **request["options"])
        except BaseException as error:
            traceback.print_exc()
            end = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return {"end": end, "facts": facts or {}} | found.as_json()


if __name__ == "__main__":
    serve()
