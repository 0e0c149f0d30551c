"""rate.py from a run folder to ratings.json, and its answers to mistakes."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import rating_sheets
from limits import HANG

ROOT = Path(__file__).parents[2]


def command(run_dir, *arguments):
    return [str(ROOT / "scripts" / "rate.py"), *arguments, "--runs_dir", str(run_dir), "--run", "r"]


@pytest.fixture
def rate(run_dir, monkeypatch, capsys):
    """Runs rate.py as python would, in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        argv = command(run_dir, *arguments)
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(argv[0], run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "r" / "evaluation"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"status": "done"}')
    (folder / "rating_responses.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rating_sheets.responses()))
    return tmp_path


def test_from_responses_to_ratings(run_dir, rate):
    ratings = run_dir / "r" / "ratings"
    code, _, error = rate("sheet")
    assert (code, error) == (0, "")
    key = json.loads((ratings / "key.json").read_text())
    assert len(key["items"]) == (4 + 2) * 3
    assert key["sheet_id"] in (ratings / "sheet.html").read_text()
    assert (ratings / "key.json").stat().st_mode & 0o077 == 0  # which raters must not see
    assert (ratings / "sheet.html").stat().st_mode & 0o044

    code, _, error = rate("sheet")  # another key would orphan the sheets that are out
    assert code == 2
    assert "there is a sheet already" in error
    assert json.loads((ratings / "key.json").read_text()) == key

    files = []
    for number, rater in enumerate(("Ann", "Bob"), start=1):
        files.append(run_dir / f"{rater}.json")
        files[-1].write_text(json.dumps(rating_sheets.filled(key, rater, number + 2, number)))
    bad = run_dir / "bad.json"
    bad.write_text(files[0].read_text().replace('"coherence": 3', '"coherence": 8', 1))
    code, _, error = rate("import", "--files", str(files[1]), str(bad))
    assert code == 2
    assert re.fullmatch(r"error: .*bad\.json: item \w+: coherence: expected .* 1 to 5, found 8\n", error)
    assert not (ratings / "ratings.json").exists()

    code, output, error = rate("import", "--files", *map(str, files))
    assert (code, error) == (0, "")
    found = json.loads((ratings / "ratings.json").read_text())
    assert found["raters"] == ["Ann", "Bob"]
    assert found["models"]["base"]["overall"]["mean"] == 3.5
    assert "no difference between full and base" in output


def test_what_is_asked_for_reaches_the_analysis(run_dir, rate, monkeypatch):
    before = os.umask(0o022)
    try:
        assert rate("sheet", "--rating_repeats", "1")[0] == 0
        assert os.umask(0o022) == 0o022  # files that come after the key may be read
    finally:
        os.umask(before)
    key = json.loads((run_dir / "r" / "ratings" / "key.json").read_text())
    assert len(key["items"]) == (4 + 1) * 3
    asked = []

    def analyse(key, sheets, *given):
        asked.append(given)
        return {"raters": ["Eve"], "incomplete": ["Ann", "Bob"], "words": ["a", "b"]}

    monkeypatch.setattr("rlhf.cli.rate.analyse", analyse)
    code, said, _ = rate("import", "--rating_confidence", "0.5", "--rating_seed", "7")
    assert (code, said) == (0, "complete sheets: 1, incomplete: Ann, Bob\na\nb\n")
    assert asked == [(["base", "full", "lora"], 0.5, 7)]


def test_serve_until_it_is_stopped(run_dir, rate):
    assert rate("sheet")[0] == 0
    python = [sys.executable, *command(run_dir, "serve")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What a shell starts in the background ignores SIGINT, and so would all that it starts.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    server = subprocess.Popen(python, env=environment, **pipes)
    signal.signal(signal.SIGINT, heard)
    try:
        url = re.search(r"http://127\S+", server.stdout.readline())[0]
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.read() == (run_dir / "r" / "ratings" / "sheet.html").read_bytes()
    finally:
        server.send_signal(signal.SIGINT)  # as Ctrl+C does
        _, error = server.communicate(timeout=HANG)
    assert (server.returncode, error) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["look"], "rate: give one of sheet, serve, import first, not 'look'"),
        (["serve"], "key.json: expected a JSON file, found: No such file"),
        (["sheet", "--rating_repeats", "9"], "rating_repeats: expected 0 to 4"),
        (["serve", "--port", "70000"], "port: expected 0 to 65535"),
    ],
)
def test_mistakes_are_one_line(rate, arguments, message):
    code, _, error = rate(*arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
