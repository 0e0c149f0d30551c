"""A process that has imported everything once, and forks a child for each run of a script: see `Forge`.

Half of what a tiny run costs is its imports. As a script it is that process: requests as JSON lines come in, answers
go out. A child is a run of one of the project's scripts, with at most one fault in it, or of a file of a test's own.

There are two such processes, the second forked from the first. The first one has imported torch and what else knows
nothing of Hugging Face's environment variables; its children import the rest themselves, so that HF_HOME, HF_ENDPOINT
and their like count (`Forge.process`). The second one begins when it is first needed, and has imported everything.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from limits import HANG

ROOT = Path(__file__).parents[1]
LIMIT = HANG
# Most of what the scripts import, and slow to import. None of it reads Hugging Face's variables, or imports what does.
# Accelerate imports DeepSpeed even where no run uses it.
GENERAL = [
    *["rlhf", "torch", "torch._inductor.compile_fx", "torch.distributed.tensor", "torch.distributed.fsdp", "pandas"],
    *["pyarrow.parquet", "scipy.stats", "scipy.optimize", "sklearn.metrics", "matplotlib.pyplot", "bitsandbytes"],
    *["google.protobuf.json_format", "tensorboard.compat.proto.event_pb2", "safetensors.torch", "jinja2"],
    *["deepspeed", "torch.utils.tensorboard", "sklearn.linear_model", "sklearn.feature_extraction.text", "fpdf"],
]


class Forge:
    """The process, as tests use it: start a run, perhaps kill it, and wait for its end."""

    def __init__(self) -> None:
        paths = [str(ROOT / folder) for folder in (".", "tests", "scripts", "tests/faults")]
        changes = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        changes |= {"DS_ACCELERATOR": "cpu"}  # DeepSpeed chooses as it is imported
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "SLURM_", "TENSORBOARD_"))}
        self.server = subprocess.Popen(
            [sys.executable, __file__], env=clean | changes, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> Any:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the forge is gone"
        return json.loads(answer)

    def start(self, script: str, argv: list[Any], log: Path, fault: dict | None = None, **env: Any) -> int:
        """Fork a run; returns its process id. What it says goes to LOG.out and LOG.err.

        script: one of those that `serve` imports, or the path of a .py file. env: beside what the forge began with.
        """
        return self.ask(
            op="start",
            script=script,
            argv=[str(a) for a in argv],
            log=str(log),
            fault=fault,
            env={name: str(value) for name, value in env.items()},
        )

    def wait(self, pid: int, limit: float = LIMIT) -> int:
        """The run's exit code, negative for a signal; past the limit it is killed, and None."""
        return self.ask(op="wait", pid=pid, limit=limit)

    def run(self, script: str, argv: list[Any], log: Path, fault: dict | None = None, **env: Any) -> tuple[int, str]:
        """A run to its end: exit code, and all that it said."""
        code = self.wait(self.start(script, argv, log, fault, **env))
        return code, said(log)

    def process(
        self, command: list[str], env: dict[str, str], cwd: Path, log: Path, limit: float, typed: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """`python COMMAND` (a script's path, or -c and code) with just these variables, as a new process would run it.

        typed: its standard input.
        It does not inherit the project's modules, nor transformers, datasets, huggingface_hub: it imports its own.
        """
        Path(f"{log}.in").write_text(typed)
        pid = self.ask(op="start", fresh=True, script=command[0], argv=command[1:], log=str(log), env=env, cwd=str(cwd))
        code = self.ask(op="wait", pid=pid, limit=limit)
        assert code is not None, f"not done after {limit} s: {said(log)[-2000:]}"
        texts = [Path(f"{log}.{end}").read_text() for end in ("out", "err")]
        return subprocess.CompletedProcess(command, code, *texts)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=HANG)
        self.server.stdout.close()


def ranks(processes: int) -> list[dict[str, Any]]:
    """What a launcher tells each rank, in the environment, of the others on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": rank, "LOCAL_RANK": rank} | shared for rank in range(processes)]


def said(log: Path) -> str:
    return Path(f"{log}.out").read_text() + Path(f"{log}.err").read_text()


def serve() -> None:
    """The first process: runs `fresh` requests itself, and hands the others to the second one."""
    gc.disable()  # what is imported is no garbage
    for name in GENERAL:
        import_module(name)
    gc.enable()
    answers, mine, second = os.fdopen(os.dup(1), "w"), set(), None
    gc.collect()
    gc.freeze()  # a child that collects garbage would copy all of the memory
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("fresh") or request.get("pid") in mine:
            answer = _answer(request)
            mine |= {answer} if request["op"] == "start" else set()
        else:
            second = second or _second()
            second[0].write(line)
            second[0].flush()
            answer = json.loads(second[1].readline())
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _second() -> tuple[TextIO, TextIO]:
    """Fork the process that imports everything; returns where its requests go and its answers come from."""
    (requests, ask), (tell, answers) = os.pipe(), os.pipe()
    if os.fork():
        os.close(requests)
        os.close(answers)
        return os.fdopen(ask, "w"), os.fdopen(tell)
    os.close(ask)
    os.close(tell)
    sys.stdin.close()
    gc.disable()
    import fsdp_cpu  # noqa: F401
    import tiny
    import tiny_ppo  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf.cli import evaluate, report, train_ppo, train_reward  # noqa: F401  so that every command's imports are there
    from rlhf.perf import hardware

    # What each run would do once: transformers' table of all kinds of models, and what this machine can do.
    with tempfile.TemporaryDirectory() as folder:
        tiny.llama().save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder)
    hardware.matmul_peak(torch.device("cpu"), torch.float32)
    hardware.memory_bandwidth(torch.device("cpu"))
    gc.enable()
    gc.collect()
    gc.freeze()
    with os.fdopen(requests) as lines, os.fdopen(answers, "w") as out:
        for line in lines:
            out.write(json.dumps(_answer(json.loads(line))) + "\n")
            out.flush()
    os._exit(0)


def _answer(request: dict[str, Any]) -> Any:
    return _fork(request) if request["op"] == "start" else _wait(request["pid"], request["limit"])


def _wait(pid: int, limit: float) -> int | None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{request['log']}.{end}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        if request.get("fresh"):
            os.environ.clear()
            os.chdir(request["cwd"])
            os.dup2(os.open(f"{request['log']}.in", os.O_RDONLY), 0)
            sys.stdin = os.fdopen(0)
        os.environ.update(request["env"])
        sys.argv = [request["script"], *request["argv"]]
        code = _run_fresh(sys.argv) if request.get("fresh") else _run(request["script"], request["fault"])
    finally:
        os._exit(code)


def _run_fresh(argv: list[str]) -> int:
    """What python does with these arguments; returns the exit code."""
    code: Any = 0
    try:
        if argv[0] == "-c":
            sys.argv = ["-c", *argv[2:]]
            exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _run(script: str, fault: dict[str, Any] | None) -> int:
    import fsdp_cpu
    import points

    from rlhf.cli.script import run_script

    points.install(fault)
    if os.environ.get("WORKER_ENGINE") == "fsdp2":
        fsdp_cpu.apply()
    code = 1
    try:
        if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
            code = 0
        else:
            run_script(sys.modules[f"rlhf.cli.{script}"].main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    points.finish(fault)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
