"""DeepSpeed's operators are compiled by one process at a time, and a build that was killed holds up nobody."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from limits import HANG

from rlhf.config import PPOConfig
from rlhf.distributed import operators
from rlhf.distributed.operators import build, build_communication
from rlhf.errors import UserError

# Builds as PyTorch does, under a file that it keeps open, until a line comes in.
BUILDER = """
import os, sys
from pathlib import Path
from rlhf.distributed.operators import build
class Builder:
    def load(self):
        lock = Path(os.environ["TORCH_EXTENSIONS_DIR"], "py311_cpu", "deepspeed_shm_comm", "lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(lock, os.O_CREAT | os.O_EXCL)
        print("begun", flush=True)
        sys.stdin.readline()
        os.close(file)
        os.remove(lock)
build(Builder(), "it")
"""


@pytest.fixture
def root(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def start(root):
    started = []

    def begin() -> subprocess.Popen[str]:
        """A process that is building."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", BUILDER], cwd=Path(__file__).parents[2], **pipes))
        assert started[-1].stdout.readline() == "begun\n"
        return started[-1]

    yield begin
    for one in started:
        if one.poll() is None:
            one.kill()
            one.communicate(timeout=HANG)


def builder(root, error=None):
    """Its `seen`: at each build, the operators whose locks were there."""

    def load():
        seen.append([path.parent.name for path in root.glob("*/*/lock")])
        if error:
            raise error

    seen = []
    return SimpleNamespace(load=load, seen=seen)


def test_a_build_that_was_killed_leaves_no_lock(root, start, capsys):
    killed = start()
    killed.kill()
    killed.wait(HANG)
    one = builder(root)
    build(one, "it")
    assert one.seen == [[]]
    lock = root / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    assert capsys.readouterr().out.splitlines() == [
        f"! {lock}: removed, since the run that built deepspeed_shm_comm was killed"
    ]
    build(one, "it")
    assert capsys.readouterr().out == ""  # said once


def test_a_build_that_goes_on_is_waited_for(root, start, capsys):
    other = start()
    waiting = subprocess.Popen(
        [sys.executable, "-c", f"from rlhf.distributed import operators\noperators._SILENT = 0.2\n{BUILDER}"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert waiting.stdout.readline().startswith("waiting for another run that compiles")
        assert other.communicate("\n", timeout=HANG)[0] == ""
        assert other.returncode == 0
        # It neither warned of a lock nor removed one.
        assert waiting.communicate(timeout=HANG)[0] == "begun\n"
        assert waiting.returncode == 0
    finally:
        if waiting.poll() is None:
            waiting.kill()
            waiting.communicate(timeout=HANG)
    assert not list(root.glob("*/*/lock"))


def test_the_lock_of_another_program_is_named_and_stays(root, capsys):
    """Nobody knows whether it still builds."""
    locks = [root / "cpu_adam" / "lock", root / "py311_cpu" / "deepspeed_shm_comm" / "lock"]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    one = builder(root)
    build(one, "it")
    assert one.seen == [["deepspeed_shm_comm"]]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in said] == [f"! {lock}" for lock in locks]
    assert "cpu_adam is being built for DeepSpeed" in said[0]
    assert all(lock.exists() for lock in locks)


def test_a_lock_that_is_in_use_stays_although_a_run_was_killed(root, capsys):
    (root / "rlhf-build").write_text("building\n")
    lock = root / "cpu_adam" / "lock"
    lock.parent.mkdir()
    with lock.open("w"):
        build(builder(root), "it")
    assert lock.exists()
    assert "is being built" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("\nno compiler: c++\nmore"), OSError("no compiler: c++")])
def test_what_does_not_compile_is_one_line_and_was_not_killed(root, error, capsys):
    with pytest.raises(
        UserError, match=r"^it did not compile; install a C\+\+ compiler and ninja, now: no compiler: c\+\+$"
    ):
        build(builder(root, error=error), "it", ", now")
    lock = root / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    build(builder(root), "it")
    assert lock.exists()


def test_without_such_locks_it_is_built_all_the_same(root, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(operators.fcntl, "flock", refuse)
    (root / "rlhf-build").write_text("building\n")
    lock = root / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    one = builder(root)
    build(one, "it")
    assert one.seen == [[]]
    assert lock.exists()  # another run may be building


@pytest.mark.parametrize("compatible", [True, False, None])
def test_communication_is_compiled_where_deepspeed_would_do_it(root, monkeypatch, compatible):
    import deepspeed.accelerator

    one = builder(root)
    one.is_compatible = lambda: compatible
    asked = []
    fake = SimpleNamespace(create_op_builder=lambda name: (asked.append(name), None if compatible is None else one)[1])
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: fake)
    build_communication()
    assert asked == ["ShareMemCommBuilder"]
    assert one.seen == ([[]] if compatible else [])


def test_only_deepspeeds_processes_need_it(monkeypatch):
    asked = []
    monkeypatch.setattr("rlhf.config.precision.build_communication", lambda: asked.append(1))
    options = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
    PPOConfig(**options)
    assert asked == []
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    PPOConfig(**options)
    assert asked == [1]
