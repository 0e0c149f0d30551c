"""Files that are stored once where they would be twice, or written in one piece; what errors of disks are called."""

import errno
import os

import pytest
from safetensors import SafetensorError

from rlhf.errors import UserError
from rlhf.storage import disk
from rlhf.storage.disk import cannot_write, store_once, write_bytes, writing


def test_equal_copies_become_one_file_and_others_stay(tmp_path):
    path = tmp_path / "model.safetensors"
    same, other = tmp_path / "checkpoint-4" / path.name, tmp_path / "checkpoint-2" / path.name
    for file, content in ((path, b"weights"), (same, b"weights"), (other, b"WEIGHTS")):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        os.utime(file, (1, 1))
    (same.parent / f".{path.name}.link").write_text("of a run that was killed")
    for _ in range(2):  # a second call changes nothing
        store_once(path, tmp_path.glob("checkpoint-*/model.safetensors"))
    assert same.samefile(path)
    assert not other.samefile(path)
    assert (same.read_bytes(), other.read_bytes()) == (b"weights", b"WEIGHTS")
    assert sorted(file.name for file in same.parent.iterdir()) == [path.name]
    same.unlink()  # as a rotation of checkpoints does
    assert path.read_bytes() == b"weights"


def test_without_hard_links_both_stay(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    path, copy = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"x")
    copy.write_bytes(b"x")
    store_once(path, [copy])
    assert copy.read_bytes() == b"x"
    assert not copy.samefile(path)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, flushed, replaced = [], disk.flush, os.replace
    monkeypatch.setattr(disk, "flush", lambda path: (done.append("flush"), flushed(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(b.name), replaced(a, b)))
    write_bytes(tmp_path / "a", b"x")
    assert done == ["flush", "a"]
    assert (tmp_path / "a").read_bytes() == b"x"
    (tmp_path / "full").mkdir()  # in its place
    with pytest.raises(UserError, match=f"^{tmp_path}/full: cannot write: Is a directory$"):
        write_bytes(tmp_path / "full", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "full"]


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EROFS"])
def test_a_disk_that_takes_no_more_is_told_from_other_errors(name):
    number = getattr(errno, name)
    assert cannot_write(OSError(number, os.strerror(number))) == os.strerror(number)
    assert cannot_write(OSError(errno.EACCES, "Permission denied")) is None


@pytest.mark.parametrize(
    ("error", "words"),
    [(OSError(28, "No space"), "No space"), (OSError("odd"), "odd"), (SafetensorError("I/O error"), "I/O error")],
)
def test_what_a_writer_raises_is_one_line(tmp_path, error, words):
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot write: {words}$"), writing(tmp_path):
        raise error
