"""What is printed: plain in a file, with colours and a live line on a terminal, and never wider than that."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.console import quiet, screen
from rlhf.console.steps import Pace, Steps

ROOT = Path(__file__).parents[2]
# A stage with its rows, a warning and a command to copy.
STAGE = """
from rlhf.console import screen
from rlhf.console.steps import Pace, Steps
screen.stage("PPO", "3 steps")
steps = Steps(("step", "  score ± se", "KL/token"), 3)
steps.start()
for step in (1, 2, 3):
    steps.row(step, [str(step), "0.50 ± 0.10", "0.020"])
    screen.warn("every response is truncated at 24 tokens: " + "raise response_length " * 3)
steps.close()
screen.ended("peak 1.0 GB")
screen.to_copy("Report  " + "x" * 70)
"""


def in_terminal(code: str, columns: int, **env: str) -> str:
    """What a program writes to a terminal of so many columns."""
    pid, file = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "COLUMNS": str(columns)} | env)
        os.execv(sys.executable, [sys.executable, "-c", code])
    fcntl.ioctl(file, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    said = b""
    try:
        while part := os.read(file, 65536):
            said += part
    except OSError:  # Linux: the other end is closed
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
    os.close(file)
    return said.decode()


def in_pipe(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout


def shown(said: str) -> list[str]:
    """The lines that stay, without codes: what follows the last return of a line."""
    lines = [line.rpartition("\r")[2] for line in said.replace("\r\n", "\n").split("\n")]
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in lines]


def test_a_pipe_gets_plain_lines():
    said = in_pipe(STAGE, FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b" not in said
    assert "\r" not in said
    lines = said.splitlines()
    assert lines[0] == "PPO                               3 steps"
    assert lines[1] == "      step     score ± se   KL/token"
    assert lines[2] == "         1    0.50 ± 0.10      0.020"
    assert lines[3].startswith("! every response is truncated at 24 tokens: raise response_length raise")
    assert len(lines) == 2 + 2 * 3 + 2
    assert re.fullmatch(r"      peak 1\.0 GB {60,}0:0\d", lines[-2])


def test_a_terminal_has_colours_a_bar_and_lines_of_its_width():
    said = in_terminal(STAGE, 60)
    assert "\x1b[1m" in said
    assert "━" in said
    assert "3/3  score 0.50 ± 0.10   KL/token 0.020" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    lines = shown(said)
    assert all(len(line) <= 60 for line in lines if not line.startswith("Report"))
    assert "Report  " + "x" * 70 in lines  # a path is never cut
    warnings = [i for i, line in enumerate(lines) if line.startswith("! ")]
    assert len(warnings) == 3
    assert lines[warnings[0] + 1].startswith("  ")  # goes on below its beginning
    assert not any("━" in line for line in lines[-3:])  # the bar has gone


def test_nothing_is_cut_off_on_a_narrow_terminal():
    """Whole words go on in the next line; only a path to copy is left for the terminal to break."""
    row = "      full    3.09   4.47  +1.38  [+0.85, +1.90]     0.096  1:14  gain, confirmed"
    code = f"from rlhf.console import screen\nscreen.say({row!r})\nscreen.error('error: stage: ' + {'a b c ' * 9!r})"
    lines = shown(in_terminal(code, 40))
    assert lines[0] == "      full    3.09   4.47  +1.38"
    assert lines[1:3] == ["        [+0.85, +1.90]     0.096  1:14", "        gain, confirmed"]
    assert " ".join(" ".join(lines[3:]).split()) == "error: stage: " + " ".join(["a b c"] * 9)
    assert all(len(line) <= 40 for line in lines)


def test_no_color_is_honoured():
    said = in_terminal(STAGE, 60, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-8]|9[0-7])[;m]", said)
    assert re.search(r"\x1b\[[0-9;]*(3[0-8]|9[0-7])[;m]", in_terminal(STAGE, 60))


def test_a_dumb_terminal_gets_plain_lines():
    said = in_terminal(STAGE, 60, TERM="dumb")
    assert "\x1b" not in said
    assert "\r" not in said.replace("\r\n", "")


def test_other_ranks_say_nothing_but_their_errors(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    screen.say("a line")
    screen.warn("a warning")
    screen.to_copy("a path")
    screen.error("error: of rank 1")
    assert capsys.readouterr() == ("", "error: of rank 1\n")


def test_nothing_that_is_printed_steers_the_terminal(capsys):
    screen.say("a\x1b[2J\nb\rc")
    screen.warn("d\ne\x9b")
    assert capsys.readouterr().out == "a\\x1b[2J\nb c\n! d e\\x9b\n"


def test_an_encoding_with_fewer_characters_gets_question_marks():
    assert in_pipe("from rlhf.console import screen\nscreen.say('5 → 6 %')", PYTHONIOENCODING="ascii") == "5 ? 6 %\n"


def test_a_reader_that_has_gone_does_not_end_the_program(tmp_path):
    code = "from rlhf.console import screen\nfor _ in range(2000):\n    screen.say('x' * 1000)\n"
    code += f"open({str(tmp_path / 'end')!r}, 'w').write('reached')"
    env = os.environ | {"PYTHONPATH": str(ROOT), "CODE": code}
    command = f'{sys.executable} -c "$CODE" | head -n 1'
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    assert (tmp_path / "end").read_text() == "reached"


@pytest.mark.parametrize(
    ("total", "steps"),
    [(3, [1, 2, 3]), (10, [1, 2, 4, 6, 8, 10]), (40, [1, 8, 16, 24, 32, 40]), (11, [1, 3, 6, 9, 11])],
)
def test_a_few_rows_of_a_quick_run_stay(capsys, total, steps):
    rows = Steps(("step",), total)
    for step in range(1, total + 1):
        rows.row(step, [str(step)])
        rows.row(step, ["once more"])
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == ["step", *map(str, steps)]


def test_every_step_of_a_slow_run_stays(capsys, monkeypatch):
    seconds = iter(range(0, 10_000, 90))
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    rows = Steps(("step",), 40)
    for step in range(1, 41):
        rows.row(step, [str(step)])
    assert len(capsys.readouterr().out.splitlines()) == 41


def test_time_left_without_the_first_step_which_warms_up():
    pace = Pace(10)
    assert [pace.left(1, 100.0), pace.left(2, 10.0), pace.left(3, 20.0)] == ["15:00", "1:20", "1:45"]
    assert pace.left(10, 30.0) == "0:00"


def test_cells_stand_in_columns():
    rows = [["", "a", "long"], ["row", "12", "x"], ["r"]]
    assert screen.table(rows, "<><", 2) == "      a  long\nrow  12  x\nr"
    assert screen.table([["a", "b"]], "<<") == "a   b"


def test_a_run_that_resumes_shows_its_own_steps(capsys):
    rows = Steps(("step",), 40, first=30)
    for step in range(31, 41):
        rows.row(step, [str(step)])
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "step",
        *["31", "32", "34", "36", "38", "40"],
    ]


def test_lines_are_redrawn_where_nothing_else_prints(monkeypatch):
    monkeypatch.setattr(screen, "_is_terminal", lambda file: True)
    for name in ("RANK", quiet.VERBOSE):
        monkeypatch.delenv(name, raising=False)
    assert screen.is_live()
    for name in ("RANK", quiet.VERBOSE):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not screen.is_live()
    monkeypatch.setattr(screen, "_is_terminal", lambda file: False)
    assert not screen.is_live()


def test_text_is_as_wide_as_the_terminal_and_not_too_wide_to_read(monkeypatch):
    assert screen._width() is None
    monkeypatch.setattr(screen, "_is_terminal", lambda file: True)
    for columns, width in ((60, 60), (120, 120), (200, 120)):
        monkeypatch.setattr(screen, "_rich", lambda file, columns=columns: SimpleNamespace(width=columns))
        assert screen._width() == width


def test_every_line_of_a_note_stands_in_the_stages_block(capsys):
    screen.note("a\nb")
    assert capsys.readouterr().out == "      a\n      b\n"


def test_a_bar_is_taken_away_once():
    steps, gone = Steps(("step",), 3), []
    steps.bar = SimpleNamespace(stop=lambda: gone.append(1))
    steps.close()
    steps.close()
    assert (gone, steps.bar) == ([1], None)


def test_outside_a_command_nothing_is_redirected(tmp_path):
    quiet.log_to(tmp_path / "logs", "x")
    assert quiet.copies is None
    assert not (tmp_path / "logs").exists()


def test_a_title_that_reaches_the_facts_pushes_them_on(monkeypatch, capsys):
    monkeypatch.delenv(screen.STAGE, raising=False)
    screen.stage("x" * 33, "facts")
    screen.stage("x" * 34, "facts")
    monkeypatch.setenv(screen.STAGE, "2/5")
    screen.stage("Reward model", "facts")
    assert capsys.readouterr().out.splitlines() == [
        "x" * 33 + " facts",
        "x" * 34 + "  facts",
        "[2/5] Reward model" + 16 * " " + "facts",
    ]


def test_the_seconds_of_a_stage_end_in_one_column(monkeypatch, capsys):
    monkeypatch.setattr(screen, "_began", 100.0)
    monkeypatch.setattr(screen.time, "monotonic", lambda: 175.0)
    for width in (70, 73, 74):  # 6 blanks before it, and 4 characters of 1:15
        screen.ended("x" * width)
    assert [len(line) for line in capsys.readouterr().out.splitlines()] == [84, 84, 6 + 74 + 3 + 4]


def test_the_seconds_of_a_stage_stay_in_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setattr(screen, "_began", 100.0)
    monkeypatch.setattr(screen.time, "monotonic", lambda: 175.0)
    for width in (60, 84, 120):
        monkeypatch.setattr(screen, "_width", lambda width=width: width)
        screen.ended("peak 1.0 GB")
    lines = capsys.readouterr().out.splitlines()
    assert [len(line) for line in lines] == [60, 84, 84]
    assert all(line.split() == ["peak", "1.0", "GB", "1:15"] for line in lines)


def test_a_bar_never_says_more_steps_than_there_are(monkeypatch):
    seen, bar = [], Steps(("step",), 10, first=4)
    monkeypatch.setattr(bar, "step", lambda done, now="": seen.append((done, now)))
    for by in (4, 3):
        bar.advance(by, f"{by} more")
    assert seen == [(8, "4 more"), (10, "3 more")]
    assert bar.done == 10


def test_a_bar_goes_before_an_error_is_shown(monkeypatch, capsys):
    gone = []
    monkeypatch.setattr(screen, "on_error", [lambda: gone.append("first"), lambda: gone.append("last")])
    screen.error("error: x")
    assert gone == ["last", "first"]
    screen.error("error: y")
    assert len(gone) == 2
    assert capsys.readouterr().err == "error: x\nerror: y\n"


def test_long_lines_go_on_below_their_beginning():
    assert screen._wrapped("    one two three", 12) == ["    one two", "      three"]
    assert screen._wrapped("a " + "x" * 20, 12) == ["a", "  " + "x" * 20]  # a path stays whole
    assert screen._wrapped("well-known fact", 8) == ["well-known", "  fact"]
    assert screen._wrapped("", 12) == [""]
