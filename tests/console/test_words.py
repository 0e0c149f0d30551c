"""Times, gains and paths as the console says them."""

import shlex

import pytest

from rlhf.console import words


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (750, "12:30"), (3723, "1:02:03")]
)
def test_clock(seconds, text):
    assert words.clock(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "1 min"), (90, "2 min"), (480, "8 min"), (5399, "90 min"), (5400, "1.5 h"), (40000, "11.1 h")],
)
def test_about(seconds, text):
    assert words.about(seconds) == f"about {text}"


def test_the_least_that_is_shortened():
    assert [words.count(n) for n in (999, 1000, 999_999, 1e6, 1e9)] == ["999", "1.0K", "1000.0K", "1.0M", "1.0B"]
    assert words.clock(3599.4) == "59:59"
    assert words.clock(3600) == "1:00:00"
    assert words.plain(-0.0004, 3) == "0.000"
    assert words.plain(-0.0006, 3) == "-0.001"
    assert words.one_line("a" * 10, 10) == "a" * 10
    assert words.one_line("a" * 11, 10) == "a" * 8 + " …"


def test_numbers():
    assert [words.count(n) for n in (512, 46_464, 134_515_008, 7e9)] == ["512", "46.5K", "134.5M", "7.0B"]
    assert [words.signed(x) for x in (0.378, -0.6, 0.004, -0.004)] == ["+0.38", "-0.60", "0.00", "0.00"]
    assert [words.plain(x) for x in (-0.004, -0.14, 0.22)] == ["0.00", "-0.14", "0.22"]
    assert words.interval(-0.6, 0.649) == "[-0.60, +0.65]"
    assert words.percent(0.958) == "96 %"
    assert words.gigabytes(7.64e9) == "7.6 GB"
    assert words.one_line("a\n  b " + "c" * 20, 10) == "a b cccc …"


def test_a_path_is_told_from_where_the_person_stands_and_can_be_pasted(tmp_path, monkeypatch):
    run = tmp_path / "my runs" / "it's"
    monkeypatch.chdir(tmp_path)
    assert shlex.split(words.path_to(run)) == ["my runs/it's"]
    monkeypatch.setenv("RLHF_SHELL_CWD", str(tmp_path / "my runs"))
    assert shlex.split(words.path_to(run)) == ["it's"]
    monkeypatch.setenv("RLHF_SHELL_CWD", "/" + "/".join("abcdefghijklmnopqrstuvwxyz" * 3))
    assert shlex.split(words.path_to(run)) == [str(run)]  # shorter than the way there
