"""The stage graph: what runs in which order, and that everything which names stages agrees with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from limits import HANG

from rlhf.cli.plan import main, planned
from rlhf.errors import UserError
from rlhf.storage.stages import POLICIES, RECIPES, REPORT, STAGES, is_done, recipe_folder, require_stage, stages_of

ROOT = Path(__file__).parents[2]


def test_a_stage_needs_only_stages_before_it():
    before = set()
    for name, spec in STAGES.items():
        assert name == spec.name
        assert before.issuperset(spec.needs), name
        before.add(name)
    assert set(POLICIES.values()) < set(STAGES)


@pytest.mark.parametrize("spec", [*STAGES.values(), REPORT], ids=lambda spec: spec.name)
def test_a_stage_has_a_script_and_a_module(spec):
    assert (ROOT / "scripts" / f"{spec.command}.py").is_file()
    assert (ROOT / "rlhf" / "cli" / f"{spec.command}.py").is_file()


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.iterdir()))
def test_recipes_hold_stages_and_nothing_else(recipe):
    assert {path.stem for path in (RECIPES / recipe).iterdir()} == set(STAGES)
    # What tells train_reward and train_ppo which of their two stages they run.
    fields = {name: yaml.safe_load((RECIPES / recipe / f"{name}.yaml").read_text()) for name in STAGES}
    assert [name for name in STAGES if fields[name].get("gold")] == ["reward_gold"]
    assert [name for name in STAGES if fields[name].get("use_peft")] == ["ppo_lora"]


def test_the_report_waits_for_every_stage():
    specs = {spec.name: spec for spec in stages_of(RECIPES / "demo")}

    def behind(name):
        return {name}.union(*(behind(other) for other in specs[name].needs))

    assert behind("report") == {*STAGES, "report"}


def test_a_recipe_without_a_stage_needs_none(tmp_path):
    for name in ("ppo_full", "evaluation"):
        (tmp_path / f"{name}.yaml").write_text("{}")
    graph = {spec.name: spec.needs for spec in stages_of(recipe_folder(str(tmp_path)))}
    assert graph == {"ppo_full": (), "evaluation": ("ppo_full",), "report": ("evaluation",)}


def test_a_recipe_of_ours_comes_before_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reward.yaml").write_text("{}")
    assert (recipe_folder("demo"), recipe_folder("mine")) == (RECIPES / "demo", Path("mine"))


def test_a_run_that_is_not_there_is_told_by_the_name_of_a_similar_one(tmp_path):
    (tmp_path / "study" / "reward").mkdir(parents=True)
    (tmp_path / "alpha" / "evaluation").mkdir(parents=True)
    (tmp_path / "studies").mkdir()  # of no stage
    with pytest.raises(UserError, match=r"run that stage first; did you mean 'study'\?$"):
        require_stage(tmp_path / "studi" / "reward")
    (tmp_path / "studi").mkdir()
    with pytest.raises(UserError, match=r"run that stage first$"):
        require_stage(tmp_path / "studi" / "reward")
    with pytest.raises(UserError, match=r"run that stage first$"):
        require_stage(tmp_path / "none" / "studi" / "reward")


def test_a_folder_without_a_stage_is_no_recipe(tmp_path):
    (tmp_path / "notes.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"^recipe: expected one of demo, gpt2-medium, smollm2, or a folder with "):
        recipe_folder(str(tmp_path))


@pytest.mark.parametrize("facts", [None, {}, {"status": "running"}, {"status": "stopped"}, {"status": "failed"}])
def test_only_a_run_json_that_says_so_is_done(tmp_path, facts):
    if facts is not None:
        (tmp_path / "run.json").write_text(json.dumps(facts))
    assert not is_done(tmp_path)
    with pytest.raises(UserError, match=f"found: {(facts or {}).get('status', 'not run')}; run that stage first"):
        require_stage(tmp_path)
    (tmp_path / "run.json").write_text('{"status":"done"}')
    assert is_done(tmp_path)
    assert require_stage(tmp_path) == tmp_path


PLAN = """
import sys
sys.argv = ["plan", *sys.argv[1:]]
from rlhf.cli.plan import main
main()
heavy = {"torch", "transformers", "trl", "numpy", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""


def plan(*argv):
    command = [sys.executable, "-c", PLAN, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_the_plan_says_what_is_done_and_imports_nothing_heavy(tmp_path):
    (tmp_path / "x" / "reward").mkdir(parents=True)
    (tmp_path / "x" / "reward" / "run.json").write_text('{"status": "done"}')
    code, lines, errors = plan("--recipe", "demo", "--run", "x", "--runs_dir", tmp_path, "--seed", "2")
    assert code == 0, errors
    rows = [line.split(maxsplit=5) for line in lines]
    assert [row[0] for row in rows] == [*STAGES, "report"]
    assert [row[1] for row in rows] == ["done", *["not_run"] * 5]
    assert [row[3] for row in rows] == ["2", "1002", "2", "2", "-", "-"]
    assert rows[2][5] == str(RECIPES / "demo" / "ppo_full.yaml")


def test_flags_of_one_stage_are_not_asked_of_the_others(tmp_path):
    """A job of Slurm for PPO alone: RLHF_FLAGS="--reward_model_path DIR", which the reward stage does not know."""
    flags = ["--reward_model_path", "judge"]
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "run.json").write_text('{"status": "done", "config": {"learning_rate": 1e-5}}')
    with pytest.raises(UserError, match="reward_model_path"):
        planned(RECIPES / "demo", tmp_path, more=flags)
    found = {one.spec.name: one for one in planned(RECIPES / "demo", tmp_path, more=flags, only="ppo_full")}
    assert (found["reward"].state, found["ppo_full"].state) == ("done", "not run")


@pytest.mark.parametrize(("status", "state"), [("done", "stale"), ("stopped", "stopped"), ("failed", "failed")])
def test_only_what_is_done_is_stale_while_an_earlier_stage_has_still_to_end(tmp_path, status, state):
    parts = {"given": {}, "flags": {}, "data": {}, "stages": {"reward": "1"}}
    for stage, facts in (
        ("reward", {"status": "running", "id": "1"}),
        ("ppo_full", {"status": status, "basis": parts}),
    ):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "run.json").write_text(json.dumps(facts))
    found = {one.spec.name: one.state for one in planned(RECIPES / "demo", tmp_path, only="evaluation")}
    assert (found["reward"], found["ppo_full"], found["ppo_lora"]) == ("running", state, "not run")


def test_the_plan_of_one_stage_and_settings_that_differ(tmp_path, monkeypatch, capsys):
    def lines(*argv):
        monkeypatch.setattr("sys.argv", ["plan", "--runs_dir", str(tmp_path), "--run", "x", *argv])
        main()
        return [line.split()[:2] for line in capsys.readouterr().out.splitlines()]

    (tmp_path / "x" / "reward").mkdir(parents=True)
    facts = {"status": "done", "config": {"learning_rate": 0.5}}
    (tmp_path / "x" / "reward" / "run.json").write_text(json.dumps(facts))
    monkeypatch.delenv("RLHF_FLAGS", raising=False)
    assert lines("--stage", "ppo_full") == [["ppo_full", "not_run"]]
    assert lines()[0] == ["reward", "differs"]
    with pytest.raises(SystemExit) as end:
        lines("--check")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: reward: settings differ (learning_rate 0.5 → ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--recipe", "none"], "error: recipe: expected one of demo"),
        (["--stage", "ppo"], "error: stage: recipe demo has reward, reward_gold"),
        (["--run", "broken"], "broken/reward/run.json: expected JSON"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(tmp_path, argv, words):
    (tmp_path / "broken" / "reward").mkdir(parents=True)
    (tmp_path / "broken" / "reward" / "run.json").write_text("{")
    code, lines, errors = plan("--runs_dir", tmp_path, *argv)
    assert (code, lines) == (2, [])
    assert words in errors
    assert len(errors.splitlines()) == 1
