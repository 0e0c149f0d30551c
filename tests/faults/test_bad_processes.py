"""The same promise through real processes: code 2, one line, no traceback; and how many cases there are."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_bad_data
import test_bad_models
import test_bad_recipes
import workers

ROOT = Path(__file__).parents[2]
# Script, flags -> the line.
COMMANDS = {
    "data": (
        ["train_reward.py", "--model_name_or_path", "x", "--dataset_name", "p.jsonl"],
        r"error: p\.jsonl:1: expected an object with fields 'chosen' and 'rejected', found an object .*",
    ),
    "recipe": (
        ["train_ppo.py", "--config", "r.yaml"],
        r"error: recipe r\.yaml: not valid YAML: field 'seed' twice, again in line 2",
    ),
    "stage": (
        ["evaluate.py", "--run", "none"],
        r"error: runs/none/reward: expected a stage that is done, found: not run; run that stage first",
    ),
    "no arguments": (
        ["rate.py"],
        r"error: rate: give one of sheet, serve, import first, not ''",
    ),
    "run": (["report.py", "--run", ".."], r"error: run: expected a plain folder name, found '\.\.'"),
}


@pytest.mark.parametrize(("command", "line"), COMMANDS.values(), ids=COMMANDS)
def test_real_processes(tmp_path, command, line):
    (tmp_path / "p.jsonl").write_text('{"chosen": "x"}\n')
    (tmp_path / "r.yaml").write_text("seed: 1\nseed: 2\n")
    before, start = sorted(tmp_path.rglob("*")), time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    argv = [str(ROOT / "scripts" / command[0]), *command[1:]]
    if command[0] == "evaluate.py":  # one of them by a Python of its own; the others in forks, which start faster
        run = {"capture_output": True, "text": True, "timeout": 120}
        done = subprocess.run([sys.executable, *argv], cwd=tmp_path, env=environment, **run)
    else:
        done = workers.python(argv, environment, tmp_path, 120)
    print(f"{command[0]}: {time.monotonic() - start:.1f} s")
    assert done.returncode == 2
    errors = [said for said in done.stderr.splitlines() if said.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert re.fullmatch(line, errors[0]), errors[0]
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_how_many_bad_inputs_there_are():
    """Each entry of a table is an input of its own; those that are tried on several scripts count once."""
    data, models, recipes = test_bad_data, test_bad_models, test_bad_recipes
    tables = {
        "data": [data.PAIRS, data.PROMPTS, data.SOURCES],
        "recipes and command lines": [recipes.FILES, recipes.PATHS, recipes.FLAGS, recipes.RUNS, recipes.PREPARED],
        "models": [models.BASES, models.POLICIES, models.REWARDS, models.GGUFS, models.NAMES],
    }
    counts = {name: sum(map(len, parts)) for name, parts in tables.items()}
    print("bad inputs:", ", ".join(f"{n} of {name}" for name, n in counts.items()), "together", sum(counts.values()))
    assert all(n >= 50 for n in counts.values())
    assert sum(counts.values()) >= 300
