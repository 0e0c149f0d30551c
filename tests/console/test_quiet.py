"""Libraries' output goes to a log, also what C code writes; the console keeps our lines, warnings and errors."""

import os
import subprocess
import sys
from pathlib import Path

from limits import HANG

ROOT = Path(__file__).parents[2]
# A command whose libraries print in every way that there is.
COMMAND = """
import ctypes, logging, os, sys, warnings
from pathlib import Path
from rlhf.console import quiet, screen
from rlhf.errors import UserError
from rlhf.cli.script import run_script
def main():
    quiet.log_to(Path("logs"), "stage")
    print("a dict")
    print("a bar", file=sys.stderr)
    warnings.warn("is deprecated", FutureWarning)
    logging.getLogger("library").warning("chatter")
    libc = ctypes.CDLL(None)
    libc.puts(b"from C")
    libc.fflush(None)
    os.write(2, b"from a descriptor\\n")
    os.system("echo from a child")
    screen.stage("Stage", "5 steps")
    screen.warn("of substance")
    END
run_script(main)
"""
CHATTER = ("a dict", "a bar", "is deprecated", "chatter", "from C", "from a descriptor", "from a child")


def run(folder: Path, end: str = "pass", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND.replace("END", end)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_console_has_our_lines_and_the_log_has_all(tmp_path):
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["Stage                             5 steps", "      ! of substance"]
    log = (tmp_path / "logs" / "stage.log").read_text()
    for words in (*CHATTER, "5 steps", "! of substance"):
        assert words in log, words


def test_verbose_leaves_it_on_the_console(tmp_path):
    done = run(tmp_path, RLHF_VERBOSE="1")
    for words in CHATTER:
        assert words in done.stdout + done.stderr, words
    assert not (tmp_path / "logs").exists()


def test_another_rank_has_a_log_of_its_own(tmp_path):
    done = run(tmp_path, RANK="1")
    assert (done.stdout, done.stderr) == ("", "")
    assert "of substance" in (tmp_path / "logs" / "stage-rank1.log").read_text()


def test_a_crash_is_short_on_the_console_and_whole_in_the_log(tmp_path):
    done = run(tmp_path, "raise RuntimeError('it\\nbroke\\nin\\nmany lines')")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[:4] == ["error: RuntimeError: it", "broke", "in", "..."]
    assert lines[4] == "in <string>, line 20; the traceback: logs/stage.log"
    log = (tmp_path / "logs" / "stage.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "many lines" in log


def test_a_users_mistake_is_one_line(tmp_path):
    done = run(tmp_path, "raise UserError('field: wrong')")
    assert (done.returncode, done.stderr) == (2, "error: field: wrong\n")
    assert "error: field: wrong" in (tmp_path / "logs" / "stage.log").read_text()


def test_the_words_that_a_command_ends_with_are_on_the_console(tmp_path):
    done = run(tmp_path, "sys.exit('stopped; run it again')")
    assert (done.returncode, done.stderr) == (1, "stopped; run it again\n")


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(tmp_path):
    (tmp_path / "logs").write_text("a file")
    done = run(tmp_path)
    assert done.returncode == 0
    assert "a dict" in done.stdout
    assert "of substance" in done.stdout


def test_a_second_start_adds_to_the_log(tmp_path):
    run(tmp_path)
    run(tmp_path)
    assert (tmp_path / "logs" / "stage.log").read_text().count("==== 20") == 2


def test_a_mistake_leaves_no_logs_of_a_run_that_never_began(tmp_path):
    code = """
import sys
from pathlib import Path
from rlhf.console import quiet
run = Path(sys.argv[1])
with quiet.command():
    quiet.log_to(run / "logs", "reward")
    if len(sys.argv) > 2:
        (run / "reward").mkdir()
    quiet.discard()
    quiet.discard()  # as another process of the run does
"""
    for more, left in (([], []), (["begun"], ["a", "a/run", "a/run/logs", "a/run/logs/reward.log", "a/run/reward"])):
        command = [sys.executable, "-c", code, str(tmp_path / "a" / "run"), *more]
        subprocess.run(command, check=True, timeout=HANG, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left


def test_what_is_dropped_is_nowhere_and_a_crash_is_on_the_console(tmp_path):
    code = """
import os, sys
from rlhf.cli.script import run_script
from rlhf.console import quiet, screen
def main():
    quiet.drop()
    print("chatter")
    os.system("echo from a child")
    screen.say("ours")
    if len(sys.argv) > 1:
        raise RuntimeError("a crash")
run_script(main)
"""
    for more in ([], ["crash"]):
        run = {"capture_output": True, "text": True, "timeout": HANG, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
        done = subprocess.run([sys.executable, "-c", code, *more], cwd=tmp_path, **run)
        assert (done.stdout, done.returncode) == ("ours\n", len(more))
        assert done.stderr.endswith("RuntimeError: a crash\n") if more else done.stderr == ""
    assert list(tmp_path.iterdir()) == []
