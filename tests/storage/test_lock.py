"""One writer per folder: a living owner is respected, a dead owner's lock is taken over."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
from limits import HANG

from rlhf.errors import UserError
from rlhf.storage.lock import NAME, FolderLock, _self, _start


@pytest.fixture
def other():
    """Another living process."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait(timeout=HANG)
    process.stdin.close()


def owned(folder, **changes):
    (folder / NAME).write_text(json.dumps(_self() | changes))


def owner(folder):
    return json.loads((folder / NAME).read_text())


def start_of(pid):
    """The 22nd field of /proc/PID/stat, parsed differently from the lock."""
    import psutil

    return round((psutil.Process(pid).create_time() - psutil.boot_time()) * os.sysconf("SC_CLK_TCK"))


def test_it_names_this_process_and_is_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lock = FolderLock(tmp_path)
    lock.take()
    found = owner(tmp_path)
    assert (found["host"], found["pid"], found["job"]) == (os.uname().nodename, os.getpid(), "77")
    assert int(found["start"].split()[1]) == pytest.approx(start_of(os.getpid()), abs=100)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_living_owner_is_named_and_stays(tmp_path, other, capsys):
    lock, theirs = FolderLock(tmp_path), FolderLock.__module__
    start = sys.modules[theirs]._start(other.pid)
    owned(tmp_path, pid=other.pid, start=start)
    with pytest.raises(
        UserError, match=rf"in use by process {other.pid} on host \S+; wait for it to end, or, .* remove the file: rm "
    ):
        lock.take()
    lock.release()  # not ours: it stays
    assert owner(tmp_path)["pid"] == other.pid
    assert capsys.readouterr().out == ""


def test_a_dead_owner_is_followed(tmp_path, other, capsys):
    start = _start(other.pid)
    other.kill()
    other.wait(timeout=HANG)
    owned(tmp_path, pid=other.pid, start=start)
    FolderLock(tmp_path).take()
    assert owner(tmp_path)["pid"] == os.getpid()
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"! {tmp_path / NAME}: taken over from process {other.pid} on host {os.uname().nodename}, which no longer runs"
    )


def test_a_number_that_another_process_has_by_now_is_no_owner(tmp_path, other):
    owned(tmp_path, pid=other.pid, start="0000 1")
    FolderLock(tmp_path).take()
    assert owner(tmp_path)["pid"] == os.getpid()


def test_a_zombie_is_dead(tmp_path, other):
    start = _start(other.pid)
    owned(tmp_path, pid=other.pid, start=start)
    other.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there
    FolderLock(tmp_path).take()
    assert owner(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize(("job", "mine"), [(None, None), ("5", "6"), (None, "6"), ("5", None)])
def test_another_host_is_never_taken_to_be_dead(tmp_path, monkeypatch, job, mine):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if mine:
        monkeypatch.setenv("SLURM_JOB_ID", mine)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # of another job, it says nothing
    owned(tmp_path, host="node7", job=job, restarts=0)
    said = "on host node7 of Slurm job 5;" if job else "on host node7;"
    with pytest.raises(UserError, match=said) as refused:
        FolderLock(tmp_path).take()
    assert str(refused.value).endswith(f"rm {tmp_path / NAME}")


@pytest.mark.parametrize(("theirs", "mine"), [(0, None), (None, None), (1, "1"), (2, "1"), (0, "zero")])
def test_the_same_start_of_a_job_on_another_node_is_another_run(tmp_path, monkeypatch, theirs, mine):
    """Two terminals of one `salloc -N2`."""
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if mine:
        monkeypatch.setenv("SLURM_RESTART_COUNT", mine)
    owned(tmp_path, host="node7", job="5", restarts=theirs)
    with pytest.raises(UserError, match="on host node7 of Slurm job 5; wait for it to end, or, if it has"):
        FolderLock(tmp_path).take()
    assert owner(tmp_path)["host"] == "node7"


@pytest.mark.parametrize(("theirs", "mine"), [(0, "1"), (1, "3"), (None, "1")])
def test_a_requeued_job_follows_itself_from_another_node(tmp_path, monkeypatch, capsys, theirs, mine):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", mine)
    owned(tmp_path, host="node7", job="5", restarts=theirs)
    FolderLock(tmp_path).take()
    assert owner(tmp_path)["host"] == os.uname().nodename
    assert "on host node7 of Slurm job 5, an earlier start of this Slurm job" in capsys.readouterr().out


def test_a_host_out_of_a_lock_file_does_not_steer_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    owned(tmp_path, host="node\x1b[2J\n7\x9b", pid="\x07", job="5", restarts=0)
    FolderLock(tmp_path).take()
    (line,) = capsys.readouterr().out.splitlines()
    assert r"taken over from process \x07 on host node\x1b[2J 7\x9b of Slurm job 5, an earlier" in line
    assert line.isprintable()


@pytest.mark.parametrize("content", ["", '{"host": "node7", "pi', "[]"])
def test_an_owner_that_died_as_it_wrote_its_name(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    FolderLock(tmp_path).take()
    assert owner(tmp_path)["pid"] == os.getpid()


def _try(folder, gate, answers):
    gate.wait(timeout=HANG)
    try:
        FolderLock(folder).take()
        answers.put("taken")
        gate.wait(timeout=HANG)  # alive until all have tried
    except UserError:
        answers.put("refused")
        gate.wait(timeout=HANG)


def _no_flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("dead", [True, False])
def test_of_many_one_becomes_the_owner(tmp_path, monkeypatch, dead):
    """All find a dead owner, or no owner and no flock, as between nodes."""
    if not dead:
        monkeypatch.setattr(fcntl, "flock", _no_flock)
    context = multiprocessing.get_context("fork")
    for n in range(5):
        folder = tmp_path / str(n)
        folder.mkdir()
        if dead:
            owned(folder, start="0000 1")
        gate, answers = context.Barrier(6), context.Queue()
        there = [context.Process(target=_try, args=(folder, gate, answers)) for _ in range(6)]
        for process in there:
            process.start()
        found = sorted(answers.get(timeout=HANG) for _ in there)
        for process in there:
            process.join(timeout=HANG)
        assert found == ["refused"] * 5 + ["taken"]


def test_who_waited_for_a_dead_owners_lock_leaves_the_next_owners_alone(tmp_path, monkeypatch, other):
    """Another one has taken over between opening the file and holding it."""
    owned(tmp_path, start="0000 1")
    flock, waits = fcntl.flock, []

    def late(file, kind):
        if not waits:
            (tmp_path / NAME).unlink()
            owned(tmp_path, pid=other.pid, start=_start(other.pid))
        waits.append(kind)
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match=f"in use by process {other.pid} on host"):
        FolderLock(tmp_path).take()
    assert owner(tmp_path)["pid"] == other.pid
    assert waits == [fcntl.LOCK_EX] * 2  # of the file that was there, and of the one that is


@pytest.mark.parametrize("links", [True, False])
def test_one_that_comes_first_at_the_last_moment_is_the_owner(tmp_path, monkeypatch, other, links):
    """Without flock, so that only the creation of the file decides; some file systems have no hard links."""
    monkeypatch.setattr(fcntl, "flock", _no_flock)
    link = os.link

    def late(source, target):
        owned(tmp_path, pid=other.pid, start=_start(other.pid))
        if not links:
            raise OSError(errno.ENOTSUP, "Operation not supported")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(UserError, match=f"in use by process {other.pid} on host"):
        FolderLock(tmp_path).take()
    assert owner(tmp_path)["pid"] == other.pid
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_an_error_that_says_nothing_of_links_is_one(tmp_path, monkeypatch):
    def torn(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", torn)
    with pytest.raises(UserError, match=f"^{tmp_path / NAME}: cannot write: Input/output error$"):
        FolderLock(tmp_path).take()
    assert list(tmp_path.iterdir()) == []


def test_without_links_and_locks_there_is_an_owner_all_the_same(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    FolderLock(tmp_path).take()
    assert owner(tmp_path) == _self()
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []
