"""A stage in a fork: its exit code, its environment, and every signal exactly once."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from limits import HANG

ROOT = Path(__file__).parents[2]
LIMIT = HANG
# A parent whose child counts signals, and ends after so many; it says who it is, and when it is ready.
PARENT = """
import json, os, signal, sys, time
from pathlib import Path
from rlhf.cli import children
def stage():
    heard = []
    for number in children.HANDED_ON:
        signal.signal(number, lambda n, _: heard.append(n))
    Path("ready").write_text("")
    end = time.monotonic() + 120
    while len(heard) < int(sys.argv[1]) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.5)  # saves its work
    Path("heard.tmp").write_text(json.dumps(heard))
    os.rename("heard.tmp", "heard")
code = children._fork(stage)
Path("code").write_text(str(code))
"""


def appears(path: Path) -> None:
    end = time.monotonic() + LIMIT
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def parent(tmp_path):
    started = []

    def begin(*argv: str, code: str = PARENT) -> subprocess.Popen[str]:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, *argv]
        options = {"cwd": tmp_path, "env": env, "start_new_session": True, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield begin
    for one in started:
        if one.poll() is None:
            one.kill()
        one.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("to", ["the process", "its group, as a terminal does"])
def test_a_signal_reaches_the_child_once_and_the_parent_waits_for_it(tmp_path, parent, number, to):
    process = parent("1")
    appears(tmp_path / "ready")
    (os.kill if to == "the process" else os.killpg)(process.pid, number)
    assert process.wait(LIMIT) == 0
    assert json.loads((tmp_path / "heard").read_text()) == [number]
    assert (tmp_path / "code").read_text() == "0"


def test_a_second_signal_reaches_it_too(tmp_path, parent):
    process = parent("2")
    appears(tmp_path / "ready")
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(LIMIT) == 0
    assert json.loads((tmp_path / "heard").read_text()) == [signal.SIGINT, signal.SIGINT]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has died")
def test_a_child_is_told_when_its_parent_is_killed(tmp_path, parent):
    process = parent("1")
    appears(tmp_path / "ready")
    process.kill()
    process.wait(LIMIT)
    appears(tmp_path / "heard")
    assert json.loads((tmp_path / "heard").read_text()) == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("work", "code", "says"),
    [
        ("pass", 0, ""),
        ("raise SystemExit(7)", 7, ""),
        ("raise UserError('field: wrong')", 2, "error: field: wrong\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("os.environ['RLHF_STAGE'] = '1/5'; raise KeyboardInterrupt", 130, ""),  # a pipeline says it for its stages
    ],
)
def test_a_child_ends_with_its_own_code(parent, work, code, says):
    lines = ["import os, signal, sys", "from rlhf.cli import children", "from rlhf.errors import UserError"]
    lines += ["def stage():", f"    {work}", "code = children._fork(stage)", "print(code, file=sys.stderr)"]
    process = parent(code="\n".join(lines))
    _, said = process.communicate(timeout=LIMIT)
    assert said == f"{says}{code}\n"


def test_an_answer_comes_back_and_a_mistake_ends_the_parent_too(parent):
    lines = ["import os", "from rlhf.cli import children", "from rlhf.errors import UserError"]
    lines += ["other = children.answer(lambda: [1, os.getpid()])", "assert other[0] == 1 and other[1] != os.getpid()"]
    lines += ["def wrong():", "    raise UserError('recipe: wrong')", "children.answer(wrong)", "print('never')"]
    process = parent(code="\n".join(lines))
    assert process.communicate(timeout=LIMIT)[1] == "error: recipe: wrong\n"
    assert process.returncode == 2


# A launcher, and a worker below it that ends when it is asked to, or does not.
LAUNCHER = """
import os, sys
from pathlib import Path
from rlhf.cli import children
run = "subprocess.run([sys.executable, '-c', *sys.argv[1:]], start_new_session=True)"  # as torch's launcher does
launcher = f"import subprocess, sys; sys.exit({run}.returncode)"
code = children.launched([sys.executable, "-c", launcher, Path("worker").read_text(), sys.argv[1]], dict(os.environ))
Path("code").write_text(str(code))
"""
WORKER = """
import os, signal, sys, time
def stop(*_):
    open("heard", "w").close()
    if sys.argv[1] == "saves for a second":
        time.sleep(1)
        sys.exit(0)
    if sys.argv[1] == "saves":
        sys.exit(0)
signal.signal(signal.SIGUSR1, stop)
with open("ready.tmp", "w") as file:
    file.write(str(os.getpid()))
os.rename("ready.tmp", "ready")
end = time.monotonic() + 120
while time.monotonic() < end:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_under_a_launcher_are_asked_to_stop(tmp_path, parent, number):
    (tmp_path / "worker").write_text(WORKER)
    process = parent("saves", code=LAUNCHER)
    appears(tmp_path / "ready")
    os.killpg(process.pid, number)
    assert process.wait(LIMIT) == 0
    assert (tmp_path / "heard").exists()
    assert (tmp_path / "code").read_text() == "0"


def test_a_second_ctrl_c_ends_them(tmp_path, parent):
    (tmp_path / "worker").write_text(WORKER)
    process = parent("does not stop", code=LAUNCHER)
    appears(tmp_path / "ready")
    os.kill(process.pid, signal.SIGINT)
    appears(tmp_path / "heard")
    time.sleep(1.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(LIMIT) == 0
    assert int((tmp_path / "code").read_text()) != 0
    worker = int((tmp_path / "ready").read_text())
    end = time.monotonic() + LIMIT
    while psutil.pid_exists(worker):  # it is dead before whoever has inherited it has waited for it
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_ctrl_c_within_a_second_are_one(tmp_path, parent):
    (tmp_path / "worker").write_text(WORKER)
    process = parent("saves for a second", code=LAUNCHER)
    appears(tmp_path / "ready")
    os.kill(process.pid, signal.SIGINT)
    appears(tmp_path / "heard")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(LIMIT) == 0
    assert (tmp_path / "code").read_text() == "0"


def test_what_nohup_ignores_stays_ignored(tmp_path, parent):
    process = parent("1", code=f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{PARENT}")
    appears(tmp_path / "ready")
    os.killpg(process.pid, signal.SIGHUP)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(LIMIT) == 0
    assert json.loads((tmp_path / "heard").read_text()) == [signal.SIGTERM]


def test_the_quickstart_is_in_place_of_its_shell(tmp_path):
    """A shell that waits for a program ends at SIGTERM, and the program goes on without it."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "quickstart.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "environment.sh").write_text('PATH="$PWD:$PATH"\n')
    (tmp_path / "rlhf").write_text('#!/bin/sh\necho "$$ $*"\n')
    (tmp_path / "rlhf").chmod(0o755)
    command = ["bash", "scripts/quickstart.sh", "--seed", "3"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        said = process.communicate(timeout=LIMIT)[0]
    assert said == f"{process.pid} quickstart --seed 3\n"


# As Python, pip and uv behave in environment.sh; the one that is named in `slow` waits, and so does its child. Where a
# file `no_uv` is, there is none.
PYTHON = """#!/bin/sh
case "$0 $*" in
    *"-m venv"*) what=venv ;;
    *"install"*" uv") what=get_uv ;;
    *"-m pip"*" config list") cat config; exit 0 ;;
    *"-m pip"*) what=pip ;;
    */uv*) what=uv; echo "$*" >uv_arguments ;;
    *) exit 0 ;;
esac
echo $what >>calls
if [ $what = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi
if [ $what = get_uv ]; then [ ! -e no_uv ] || exit 1; cp "$0" .venv/bin/uv; fi
if [ "$(cat slow)" = $what ]; then
    sleep 300 &
    echo "$$ $!" >ready.tmp
    mv ready.tmp ready
    wait
fi
if [ $what = uv ] && [ -e uv_fails ]; then echo "uv: no"; echo "uv: no" >&2; exit 1; fi
[ $what != venv ] || touch .venv/bin/activate
"""


@pytest.fixture
def quickstart(tmp_path):
    """The command that begins the quickstart, and how to start it, in a folder with its own Python, pip and uv."""
    (tmp_path / "scripts").mkdir()
    for name in ("quickstart.sh", "environment.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    files = {"python": PYTHON, "rlhf": "#!/bin/sh\necho begins\n", "slow": "", "config": ""}
    for name, text in files.items() | dict.fromkeys(("constraints.txt", "pyproject.toml"), "").items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    options = {"cwd": tmp_path, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return ["bash", "scripts/quickstart.sh"], options


@pytest.mark.parametrize(
    ("slow", "numbers"),
    [
        ("venv", [signal.SIGTERM]),
        ("get_uv", [signal.SIGTERM]),
        ("uv", [signal.SIGTERM]),
        ("uv", [signal.SIGINT, signal.SIGINT]),
        ("pip", [signal.SIGHUP]),
    ],
)
def test_a_signal_ends_the_making_of_the_environment_and_the_next_call_goes_on(tmp_path, quickstart, slow, numbers):
    command, options = quickstart
    (tmp_path / "slow").write_text(slow)
    if slow == "pip":
        (tmp_path / "no_uv").touch()
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        appears(tmp_path / "ready")
        for number in numbers:
            os.kill(process.pid, number)
        said = process.communicate(timeout=LIMIT)[0]
    assert (process.returncode, said) == (128 + numbers[0], "setting up .venv (a few minutes, once)\n")
    left = [int(pid) for pid in (tmp_path / "ready").read_text().split()]
    end = time.monotonic() + LIMIT
    while any(map(psutil.pid_exists, left)):  # until whoever has inherited them has waited for them
        assert time.monotonic() < end
        time.sleep(0.05)
    (tmp_path / "slow").write_text("")
    order = ["venv", "get_uv", "pip" if slow == "pip" else "uv"]
    calls = order[: order.index(slow) + 1] + order[slow != "venv" :]
    for _ in range(2):  # the second of these calls has nothing to make
        done = subprocess.run(command, timeout=LIMIT, check=True, **options)
        assert done.stdout.endswith("begins\n")
        assert (tmp_path / "calls").read_text().split() == calls


@pytest.mark.parametrize("why", ["no_uv", "uv_fails"])
def test_without_uv_packages_are_installed_by_pip(tmp_path, quickstart, why):
    command, options = quickstart
    (tmp_path / why).touch()
    done = subprocess.run(command, timeout=LIMIT, check=True, **options)
    assert done.stdout == "setting up .venv (a few minutes, once)\nbegins\n"
    assert (tmp_path / "calls").read_text().split()[-1] == "pip"


def test_uv_is_told_what_pip_is_set_to(tmp_path, quickstart):
    """Environment variables first, as pip itself takes them; two values of one setting stand on two lines."""
    command, options = quickstart
    lines = [":env:.find-links='a b'", "global.extra-index-url='https://one/simple\\nhttps://two/simple'"]
    lines += ["global.find-links='c'", "global.timeout='60'", "install.constraint='other.txt'"]
    (tmp_path / "config").write_text("\n".join(lines))
    subprocess.run(command, timeout=LIMIT, check=True, **options)
    said = (tmp_path / "uv_arguments").read_text().split()
    pairs = list(itertools.pairwise(said))
    assert [pair for pair in pairs if pair[0] == "--find-links"] == [("--find-links", "a"), ("--find-links", "b")]
    assert [value for name, value in pairs if name == "--index"] == ["https://one/simple", "https://two/simple"]
    assert [value for name, value in pairs if name == "--constraint"] == ["other.txt", "constraints.txt"]
    assert "--default-index" not in said


def test_a_pip_that_may_only_take_some_packages_is_asked_itself(tmp_path, quickstart):
    command, options = quickstart
    (tmp_path / "config").write_text("global.no-index='true'")
    subprocess.run(command, timeout=LIMIT, check=True, **options)
    assert (tmp_path / "calls").read_text().split() == ["venv", "pip"]
