"""What comes out of a command: its exit code, and what is said where."""

import io
from pathlib import Path

import pytest

from rlhf.cli import script
from rlhf.console import quiet, screen
from rlhf.errors import UserError


@pytest.fixture
def ended(monkeypatch, capsys):
    """Run a command that ends like this; returns its exit code, the console's lines, and whether logs are removed."""
    discarded = []
    monkeypatch.setattr(quiet, "discard", lambda: discarded.append(True))
    monkeypatch.setattr("rlhf.distributed.collectives.exit_together", lambda: None)

    def by(error=None):
        def main():
            if error is not None:
                raise error

        discarded.clear()
        with pytest.raises(SystemExit) as end:
            script.run_script(main)
        return end.value.code, capsys.readouterr().err, bool(discarded)

    return by


@pytest.fixture
def logged(monkeypatch, tmp_path):
    """Output goes to a log; returns what stands on the console."""
    console = io.StringIO()
    monkeypatch.setattr(quiet, "copies", quiet.Copies(console, console, tmp_path / "ppo.log", ()))
    return console


def test_each_end_has_its_code(ended, monkeypatch):
    assert ended() == (0, "", False)
    assert ended(UserError("a: b")) == (2, "error: a: b\n", True)
    assert ended(SystemExit(2)) == (2, "", True)  # of a stage that a pipeline has run
    assert ended(SystemExit(3)) == (3, "", False)
    assert ended(SystemExit("reward: stopped")) == (1, "reward: stopped\n", False)
    assert ended(KeyboardInterrupt()) == (130, "interrupted\n", False)
    monkeypatch.setenv(screen.STAGE, "1/5")
    assert ended(KeyboardInterrupt()) == (130, "", False)  # which the pipeline says


def test_a_full_disk_is_one_line(ended):
    error = OSError(28, "No space left on device", "x.bin")
    assert ended(error) == (2, "error: x.bin: cannot write: No space left on device\n", False)
    assert ended(OSError(28, "No space left on device")) == (
        2,
        "error: disk: cannot write: No space left on device\n",
        False,
    )


def test_a_crash_without_a_log_is_pythons_own():
    def main():
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        script.run_script(main)
    with pytest.raises(FileNotFoundError):
        script.run_script(Path("gone").read_text)


def test_a_crash_is_told_by_its_first_lines_and_its_place(ended, logged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, log, discarded = ended(ValueError("a\nb\nc\nd"))
    assert (code, discarded) == (1, False)
    assert "Traceback" in log
    first, *more, last = logged.getvalue().splitlines()
    assert [first, *more] == ["error: ValueError: a", "b", "c", "..."]
    assert last.startswith("in test_script.py, line ")
    assert last.endswith("; the traceback: ppo.log")


def test_a_crash_of_three_lines_is_told_whole(ended, logged):
    ended(ValueError("a\nb\nc"))
    assert logged.getvalue().splitlines()[:-1] == ["error: ValueError: a", "b", "c"]


def test_a_crash_of_a_rank_says_which(ended, logged, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert ended(ValueError("x"))[0] == 1
    assert "; the traceback of rank 3: " in logged.getvalue()


def test_a_crash_of_a_dry_run_is_all_on_the_console(ended, logged, monkeypatch):
    monkeypatch.setattr(quiet, "is_dropped", lambda: True)
    code, log, _ = ended(ValueError("x"))
    assert (code, log) == (1, "")
    assert logged.getvalue().startswith("Traceback ")
    assert logged.getvalue().endswith("ValueError: x\n")
