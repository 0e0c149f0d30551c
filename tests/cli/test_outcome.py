"""The last lines of a pipeline: each policy's own figures, and what to open."""

import json

import pytest

from rlhf.cli.outcome import show_outcome
from rlhf.config import RunConfig


def write(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_SHELL_CWD", raising=False)
    gains = {
        "full": {"before": 0.1, "after": 0.9, "gain": 0.8, "interval": [0.5, 1.1]},
        "lora": {"before": 0.1, "after": -0.004, "gain": -0.1, "interval": [-0.3, 0.1]},
    }
    models = {"base": {}, "full": {"kl_per_token": 0.0456}, "lora": {}}
    write(
        tmp_path / "runs" / "study" / "evaluation" / "evaluation.json",
        {"n_prompts": 50, "confidence": 0.9, "gains": gains, "models": models},
    )
    write(tmp_path / "runs" / "study" / "ppo_full" / "run.json", {"seconds": 75.2})
    return RunConfig(run="study")


def test_each_policy_has_a_row_of_its_own_figures(run, capsys):
    show_outcome(run)
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "before after gain [90%] KL/token time",
        "full 0.10 0.90 +0.80 [+0.50, +1.10] 0.046 1:15 gain, not checked",
        "LoRA 0.10 0.00 -0.10 [-0.30, +0.10] no gain shown",
        "Full: a gain, not checked by a second reward model. LoRA: no gain shown.",
        "Report runs/study/report/report.html",
    ):
        assert line in said
    assert any(line.startswith("Next ") and line.endswith("rlhf compare --run study") for line in said)
    assert any(line.endswith("rlhf rate sheet --run study") for line in said)
    assert any(line.endswith("--logdir runs/study") for line in said)


def test_a_run_elsewhere_and_files_beside_the_page_are_named(run, capsys, tmp_path):
    (tmp_path / "runs").rename(tmp_path / "my runs")
    report = tmp_path / "my runs" / "study" / "report"
    report.mkdir()
    for end in ("html", "pdf", "ipynb"):
        (report / f"mine.{end}").write_text("")
    write(report / "run.json", {"page": "mine.html"})
    show_outcome(RunConfig(run="study", runs_dir="my runs"))
    said = capsys.readouterr().out
    assert "Report  'my runs/study/report/mine.html' (.pdf, .ipynb)\n" in said
    assert "compare --run study --runs_dir 'my runs'\n" in said


def test_without_an_evaluation_there_is_nothing_to_compare(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    show_outcome(RunConfig(run="none"))
    said = capsys.readouterr().out
    assert "Report" in said
    assert "compare" not in said
    assert "gain" not in said
