"""The last lines of a pipeline: each policy's own figures, and what to open."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from rlhf import __version__
from rlhf.cli import outcome, stage_head
from rlhf.cli.outcome import show_header, show_outcome
from rlhf.config import RunConfig
from rlhf.console import quiet, screen


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


def test_each_policy_has_its_own_time(run, capsys, tmp_path):
    write(tmp_path / "runs" / "study" / "ppo_lora" / "run.json", {"seconds": 3725.0})
    show_outcome(run)
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "full 0.10 0.90 +0.80 [+0.50, +1.10] 0.046 1:15 gain, not checked" in said
    assert "LoRA 0.10 0.00 -0.10 [-0.30, +0.10] 1:02:05 no gain shown" in said


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


@pytest.mark.parametrize(
    ("threads", "processes", "kind", "precision", "on"),
    [
        (1, 1, "cpu", None, ["1 CPU thread"]),
        (4, 1, "cpu", "fp32", ["4 CPU threads", "fp32"]),
        (4, 2, "cpu", "fp32", ["2 processes, each on 4 CPU threads", "fp32"]),
        (4, 1, "meta", "bf16", ["a meta", "bf16"]),
        (4, 8, "meta", None, ["8 processes, each on a meta"]),
    ],
)
def test_a_stage_that_runs_alone_says_what_it_runs_on(monkeypatch, capsys, threads, processes, kind, precision, on):
    shown = []
    monkeypatch.setattr(stage_head, "show_header", lambda *given: shown.append(given))
    monkeypatch.setattr(stage_head, "device_name", lambda device: f"a {device}")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.delenv(screen.STAGE, raising=False)
    stage_head.show_stage("PPO", "3 steps", torch.device(kind), precision, Path("runs/study"))
    assert shown == [("study", on, Path("runs/study"))]
    monkeypatch.setenv(screen.STAGE, "3/5")  # whose pipeline has printed it
    stage_head.show_stage("PPO", "3 steps", torch.device(kind), precision, Path("runs/study"))
    assert len(shown) == 1
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["PPO", "3", "steps"],
        ["[3/5]", "PPO", "3", "steps"],
    ]


def test_the_header_says_what_and_where_and_how_long(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_SHELL_CWD", raising=False)
    sizes = {"SC_PHYS_PAGES": 4_000_000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    show_header("demo", ["2 CPU threads", "bf16"], tmp_path / "runs" / "x", "about 3 min")
    line = f"rlhf {__version__}  demo on 2 CPU threads, bf16, 16 GB   about 3 min   logs: runs/x/logs"
    assert capsys.readouterr().out == f"{line}\n\n"
    monkeypatch.setattr(quiet, "is_dropped", lambda: True)
    show_header("demo", [], tmp_path / "runs" / "x")
    assert capsys.readouterr().out == f"rlhf {__version__}  demo on 16 GB\n\n"


def test_a_program_is_called_by_its_name_where_the_shell_finds_it(monkeypatch, tmp_path):
    ours, theirs = tmp_path / "venv" / "bin", tmp_path / "bin"
    for folder in (ours, theirs):
        folder.mkdir(parents=True)
        (folder / "rlhf").write_text("")
        (folder / "rlhf").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_SHELL_CWD", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    for path, called in ((ours, "rlhf"), (theirs, "venv/bin/rlhf"), (tmp_path, "venv/bin/rlhf")):
        monkeypatch.setenv("RLHF_SHELL_PATH", str(path))
        assert outcome._command("rlhf") == called
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "none"))
    assert outcome._command("rlhf") == "rlhf"
