"""The whole pipeline as a user runs it, on tiny models; and again, when there is nothing left to do."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny_ppo
import workers
from limits import HANG
from recorded import different
from tiny_recipe import recipe
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.cli import pipeline as module
from rlhf.config import PipelineConfig, RunConfig
from rlhf.reporting.conclusions import verdict
from rlhf.storage.stages import RECIPES

ROOT = Path(__file__).parents[2]
STAGES = ("reward", "reward_gold", "ppo_full", "ppo_lora", "evaluation")


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def pipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pipeline.py; it starts the stages as for a user, as real processes."""
    command = [str(ROOT / "scripts" / "pipeline.py"), "--engine", "cpu", *arguments]
    return workers.python(
        command, ENVIRONMENT, ROOT, limit=HANG
    )  # on a busy machine six starts of a stage take minutes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    top = tmp_path_factory.mktemp("pipeline")
    arguments = ["--recipe", str(recipe(top / "recipe")), "--run", "tiny", "--runs_dir", str(top / "runs")]
    return arguments, top / "runs" / "tiny", top / "recipe" / "base", pipeline(*arguments)


def test_all_stages_end_and_say_so(run):
    _, folder, _, result = run
    assert result.returncode == 0, result.stderr[-2000:]
    for stage in STAGES:
        facts = json.loads((folder / stage / "run.json").read_text())
        assert facts["status"] == "done"
        assert facts["world_size"] == 1
        assert facts["command"].startswith("python -m rlhf.cli.")
    assert "tensorboard --logdir" in result.stdout.splitlines()[-3]
    assert (folder / "report" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("stage", ["reward", "reward_gold"])
def test_a_reward_models_weights_are_stored_once(run, stage):
    (checkpoint,) = (run[1] / stage).glob("checkpoint-*/model.safetensors")
    assert checkpoint.samefile(run[1] / stage / "model.safetensors")


def test_data_counts_are_in_run_json(run):
    counts = json.loads((run[1] / "reward" / "run.json").read_text())["data"]["preferences"]
    assert (counts["rows"], counts["empty_response"], counts["prompts_differ"], counts["merged_turns"]) == (
        207,
        1,
        1,
        1,
    )
    assert (counts["split_train"], counts["split_validation"], counts["split_test"]) == (16, 8, 8)
    prompts = json.loads((run[1] / "ppo_full" / "run.json").read_text())["data"]["prompts"]
    assert (prompts["deleted"], prompts["other_language"], prompts["duplicate"]) == (3, 5, 2)


CHANGES = re.compile(r"/(path|\w+_runtime|\w+_per_second): ")  # from run to run


def numbers(folder: Path) -> dict[str, Any]:
    """All that a run's files say of training and evaluation, but times and paths."""

    def rows(path: Path) -> list[Any]:
        return [tiny_ppo.timeless(json.loads(line)) for line in path.read_text().splitlines()]

    found: dict[str, Any] = {f"{stage} metrics": rows(folder / stage / "metrics.jsonl") for stage in STAGES[:4]}
    for stage in ("reward", "reward_gold", "evaluation"):
        found[f"{stage} evaluation"] = json.loads((folder / stage / "evaluation.json").read_text())
    for name in ("responses", "rating_responses"):
        found[name] = rows(folder / "evaluation" / f"{name}.jsonl")
    return found


def test_its_numbers_are_those_recorded(run):
    """Where they are meant to change: remove the file, run this twice, and look at what changed."""
    recorded, found = Path(__file__).with_suffix(".json"), numbers(run[1])
    if not recorded.exists():
        recorded.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        pytest.fail(f"{recorded.name} is written anew")
    wrong = different(found, json.loads(recorded.read_text(encoding="utf-8")), 1e-2)
    assert [line for line in wrong if not CHANGES.search(line)] == []


def test_what_was_saved_loads_with_plain_transformers(run):
    _, folder, base, _ = run
    for stage in ("ppo_full", "ppo_lora"):
        model = AutoModelForCausalLM.from_pretrained(folder / stage)
        stock = AutoModelForCausalLM.from_pretrained(base)
        assert model.state_dict().keys() == stock.state_dict().keys()
        assert "Human: " in AutoTokenizer.from_pretrained(folder / stage).chat_template
    assert AutoModelForSequenceClassification.from_pretrained(folder / "reward").config.num_labels == 1


def test_every_model_has_a_card_with_the_figures_of_the_run(run):
    _, folder, base, _ = run
    for place in ("reward", "reward_gold", "ppo_full", "ppo_lora", "ppo_lora/adapter"):
        text = (folder / place / "README.md").read_text()
        facts = json.loads((folder / place.removesuffix("/adapter") / "run.json").read_text())
        assert "Not evaluated yet" not in text
        assert str(folder / place) in text
        assert f"`{base}`" in text
        assert f"| `ended` | `{facts['ended']}` |" in text
        assert facts["command"].split()[-1] in text
    gains = json.loads((folder / "evaluation" / "evaluation.json").read_text())["gains"]
    for place, name in (("ppo_full", "full"), ("ppo_lora", "lora"), ("ppo_lora/adapter", "lora")):
        low, high = gains[name]["interval"]
        row = f"| gain in reward |  | {gains[name]['gain']:+.3f} [{low:+.3f}, {high:+.3f}] |"
        assert row in (folder / place / "README.md").read_text()
    reward = json.loads((folder / "reward" / "evaluation.json").read_text())["after"]
    assert f"{reward['accuracy']:.1%}" in (folder / "reward" / "README.md").read_text()


def test_evaluation_holds_every_prompt_and_model_once(run):
    rows = [json.loads(line) for line in (run[1] / "evaluation" / "responses.jsonl").read_text().splitlines()]
    assert len({(row["prompt_id"], row["model"]) for row in rows}) == len(rows) == 7 * 3
    summary = json.loads((run[1] / "evaluation" / "evaluation.json").read_text())
    for name in ("base", "full", "lora"):
        scores = [row["score"] for row in rows if row["model"] == name]
        assert summary["models"][name]["mean_reward"] == pytest.approx(sum(scores) / 7)


def test_the_models_answer_side_by_side(run):
    _, folder, _, _ = run
    where = ["--run", folder.name, "--runs_dir", str(folder.parent)]
    environment = ENVIRONMENT | {"COLUMNS": "90", "ACCELERATE_USE_CPU": "true"}
    command, typed = [str(ROOT / "scripts" / "compare.py"), *where], "What is the moon?\nAnd the sun?\n\n"
    result = workers.python(command, environment, ROOT, typed=typed)
    assert result.returncode == 0, result.stderr[-2000:]
    titles = [line for line in result.stdout.splitlines() if "score" in line]
    assert len(titles) == 2
    for title in titles:
        assert [word for word in title.split() if word in ("base", "full", "lora")] == ["base", "full", "lora"]


def test_a_second_reward_model_of_other_pairs_judges_too(run):
    _, folder, _, _ = run
    first, second = (json.loads((folder / stage / "run.json").read_text()) for stage in ("reward", "reward_gold"))
    assert first["seed"] != second["seed"]
    assert len(first["train_openings"]) > 8
    assert len(second["train_openings"]) > 8
    assert not set(first["train_openings"]) & set(second["train_openings"])
    rows = [json.loads(line) for line in (folder / "evaluation" / "responses.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    for name in ("full", "lora"):
        gold = {m: [row["gold_score"] for row in rows if row["model"] == m] for m in ("base", name)}
        gain = sum(gold[name]) / 7 - sum(gold["base"]) / 7
        assert summary["validity"][name]["gold"]["gain"] == pytest.approx(gain)
    assert gold["base"] != [row["score"] for row in rows if row["model"] == "base"]


def test_rating_prompts_are_answered_by_every_model(run):
    rows = [json.loads(line) for line in (run[1] / "evaluation" / "rating_responses.jsonl").read_text().splitlines()]
    assert len({(row["prompt_id"], row["model"]) for row in rows}) == len(rows) == 3 * 3
    evaluated = (run[1] / "evaluation" / "responses.jsonl").read_text()
    assert not any(f'"prompt_id": "{row["prompt_id"]}"' in evaluated for row in rows)


def test_tensorboard_has_every_stage(run):
    for stage in STAGES:
        assert list((run[1] / stage).rglob("events.out.tfevents.*")), stage


def test_a_second_call_skips_what_is_done(run):
    arguments, folder, _, _ = run
    before = (folder / "ppo_full" / "metrics.jsonl").stat().st_mtime_ns
    again = pipeline(*arguments)
    assert again.returncode == 0
    assert again.stdout.count("already done") == 5
    assert (folder / "ppo_full" / "metrics.jsonl").stat().st_mtime_ns == before


CHATTER = (
    *("LOAD REPORT", "Warning", "warn(", "Writing model shards", "Loading weights", "accelerator.py", "examples/s"),
    *("it/s", "pair/s", "{'", "[transformers]", "gemm", "attention_mask", "deprecated", "missing the following glyphs"),
)


def test_the_console_is_short_and_plain_and_free_of_libraries(run):
    result = run[3]
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) <= 60
    for words in ("\x1b", "\r", *CHATTER):
        assert words not in result.stdout, words


def test_the_console_says_what_each_stage_did(run):
    _, folder, _, result = run
    lines = result.stdout.splitlines()
    assert lines[0].startswith("rlhf ")
    assert "CPU thread" in lines[0]
    assert "   about 3 min   logs: " in lines[0]  # six times what no setting changes
    assert (ROOT / lines[0].split("logs: ")[1]).resolve() == folder / "logs"
    heads = [line[:5] for line in lines if line.startswith("[")]
    assert heads == ["[1/5]", "[2/5]", "[3/5]", "[4/5]", "[5/5]"]
    reward = json.loads((folder / "reward" / "evaluation.json").read_text())
    before, after = (f"{reward[when]['accuracy']:.0%}".replace("%", " %") for when in ("before", "after"))
    assert any(f"test, 8 pairs: {before} → {after} [" in line for line in lines)
    rows = [json.loads(line) for line in (folder / "ppo_full" / "metrics.jsonl").read_text().splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("[3/5]"))
    shown = [line.split() for line in lines[start + 2 : start + 9] if line.split()[0] in ("1", "2", "3")]
    assert [cells[1] for cells in shown] == [f"{row['objective/scores']:.2f}" for row in rows]
    evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert verdict(evaluation).headline in lines
    table = [line.split() for line in lines if line.startswith(("      full  ", "      LoRA  ", "full  ", "LoRA  "))]
    assert len(table) == 4  # of the evaluation, and at the end
    for cells, name in zip(table[2:], ("full", "lora"), strict=True):
        gain = evaluation["gains"][name]
        assert [float(cell) for cell in cells[1:4]] == [round(gain[key], 2) for key in ("before", "after", "gain")]


def test_what_libraries_say_is_in_the_logs(run):
    logs = run[1] / "logs"
    found = {path.stem for path in logs.iterdir()} - {"compare"}  # another test has compared this run's models
    assert found == {"pipeline", *STAGES, "report"}
    assert "LOAD REPORT" in (logs / "reward.log").read_text()
    assert "preference pairs: rows 207, " in (logs / "reward.log").read_text()
    assert "speed: " in (logs / "ppo_full.log").read_text()


def test_a_mistake_in_a_later_stage_is_found_before_the_first(run, tmp_path):
    _, _, base, _ = run
    shutil.copytree(base.parent, tmp_path / "recipe")
    with (tmp_path / "recipe" / "ppo_lora.yaml").open("a") as file:
        file.write("learning_rat: 1.0\n")
    done = pipeline("--recipe", str(tmp_path / "recipe"), "--run", "wrong", "--runs_dir", str(tmp_path / "runs"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: recipe {tmp_path / 'recipe' / 'ppo_lora.yaml'}: field 'learning_rat': unknown")
    assert not (tmp_path / "runs" / "wrong" / "reward").exists()


def ids(folder):
    return {stage: json.loads((folder / stage / "run.json").read_text())["id"] for stage in STAGES}


def test_settings_that_differ_are_refused_and_redone_with_all_that_follows(run, tmp_path):
    arguments, folder, _, _ = run
    copy = tmp_path / "runs" / "copied"
    shutil.copytree(folder, copy)
    here = tmp_path / "recipe"
    shutil.copytree(arguments[1], here)
    (here / "ppo_full.yaml").write_text("# slower\n" + (here / "ppo_full.yaml").read_text() + "learning_rate: 3.0e-3\n")
    arguments = ["--recipe", str(here), "--run", copy.name, "--runs_dir", str(copy.parent)]
    before, report = ids(copy), (copy / "report" / "report.html").read_bytes()

    refused = pipeline(*arguments)
    assert refused.returncode == 2
    words = "error: ppo_full: settings differ (learning_rate 1e-05 → 0.003): --redo, or another --run"
    assert refused.stderr.splitlines() == [words]
    assert "done" not in refused.stdout
    assert (ids(copy), (copy / "report" / "report.html").read_bytes()) == (before, report)

    redone = pipeline(*arguments, "--redo")
    assert redone.returncode == 0, redone.stderr[-2000:]
    assert redone.stdout.count("already done") == 3
    assert "[5/5] Evaluation: again, since ppo_full changed" in redone.stdout
    after = ids(copy)
    assert {stage for stage in STAGES if after[stage] != before[stage]} == {"ppo_full", "evaluation"}
    assert (copy / "report" / "report.html").read_bytes() != report
    assert json.loads((copy / "ppo_full" / "run.json").read_text())["config"]["learning_rate"] == 3e-3

    again = pipeline(*arguments)
    assert again.returncode == 0
    assert again.stdout.count("already done") == 5
    assert "Report: nothing has changed since it was written" in again.stdout
    assert ids(copy) == after


def test_one_run_per_seed_and_a_report_on_all(tmp_path):
    here = recipe(tmp_path / "recipe")
    for stage in STAGES[1:]:
        (here / f"{stage}.yaml").unlink()
    arguments = ["--recipe", str(here), "--run", "tiny", "--runs_dir", str(tmp_path / "runs"), "--seeds", "3,5"]
    done = pipeline(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {
        path.name: json.loads((path / "reward" / "run.json").read_text())["seed"]
        for path in (tmp_path / "runs").glob("tiny-*")
    }
    assert found == {"tiny-seed3": 3, "tiny-seed5": 5}
    assert (tmp_path / "runs" / "tiny" / "report" / "seeds.html").exists()
    again = pipeline(*arguments)
    assert again.stdout.count("already done") == 2
    assert again.stdout.count("nothing has changed since it was written") == 3
    other = pipeline(*arguments[:-2], "--seed", "4", "--run", "tiny-seed3")
    assert "settings differ (seed 3 → 4)" in other.stderr


def test_a_run_that_was_moved_works_from_anywhere(run, tmp_path):
    arguments, folder, _, _ = run
    shutil.copytree(folder, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "evaluation")
    for stage in STAGES[:4]:
        facts = json.loads((tmp_path / "moved" / stage / "run.json").read_text())
        assert facts["config"]["output_dir"] == stage
        assert str(folder.parent) not in json.dumps(facts | {"command": ""})
    environment = ENVIRONMENT | {"COLUMNS": "90", "ACCELERATE_USE_CPU": "true"}
    where = ["--run", "moved", "--runs_dir", "."]
    evaluation = ["--config", f"{arguments[1]}/evaluation.yaml"]
    for command in (["evaluate.py", *evaluation], ["compare.py", "--prompt", "What is the moon?"]):
        done = workers.python([str(ROOT / "scripts" / command[0]), *command[1:], *where], environment, tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads((tmp_path / "moved" / "evaluation" / "run.json").read_text())
    assert {name: facts["model_paths"][name] for name in ("full", "lora")} == {"full": "ppo_full", "lora": "ppo_lora"}
    assert facts["judge_paths"] == {"reward": "reward", "gold": "reward_gold"}
    before, after = (
        json.loads((place / "evaluation" / "evaluation.json").read_text()) for place in (folder, tmp_path / "moved")
    )
    assert after["gains"] == before["gains"]


@pytest.mark.parametrize(
    ("code", "ends", "says"),
    [(0, 1, ""), (130, 130, "reward: interrupted; run the same command again to resume\n")],
)
def test_a_stage_that_was_told_to_stop_is_spoken_of_once(tmp_path, monkeypatch, capsys, code, ends, says):
    """One that ends with code 0 and is not done has kept its place, and said so."""
    monkeypatch.setattr(module, "_starter", lambda *given: lambda *stage: code)
    with pytest.raises(SystemExit) as ended:
        module._run_all(RunConfig("x", str(tmp_path)), RECIPES / "demo", None, PipelineConfig())
    assert (ended.value.code, capsys.readouterr().err) == (ends, says)
