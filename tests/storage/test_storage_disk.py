"""Files that are stored once where they would be twice."""

import os

from rlhf.storage.disk import store_once


def test_equal_copies_become_one_file_and_others_stay(tmp_path):
    path = tmp_path / "model.safetensors"
    same, other = tmp_path / "checkpoint-4" / path.name, tmp_path / "checkpoint-2" / path.name
    for file, content in ((path, b"weights"), (same, b"weights"), (other, b"WEIGHTS")):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
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
