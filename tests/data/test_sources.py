import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rlhf.data.sources import checked_text, fetch, is_hub_id, read_rows, text_field
from rlhf.errors import UserError


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.jsonl", b'{"x": 1}\n\n"two"\n', [(1, {"x": 1}), (3, "two")]),
        ("a.jsonl", b'\xef\xbb\xbf{"x": 1}\r\n[2]', [(1, {"x": 1}), (2, [2])]),
        ("a.json", b'{"x": 1}\n{"x": 2}\n', [(1, {"x": 1}), (2, {"x": 2})]),
        ("a.json", b'\n[\n {"x":\n  1}, "b"\n,\n\n  [3]\n]\n', [(3, {"x": 1}), (4, "b"), (7, [3])]),
        ("a.json", b"[]", []),
        ("a.json", b" [ 1 , 2 ] ", [(1, 1), (1, 2)]),
        ("a.json", b"", []),
        (
            "a.csv",
            b'\xef\xbb\xbfa,b\r\n1,"two,\r\n\r\n""2"""\r\n\r\n,x\n',
            [(2, {"a": "1", "b": 'two,\r\n\r\n"2"'}), (6, {"a": "", "b": "x"})],
        ),
        ("a.csv", b'a;b;c, d\n"[{""x"": 1}]";[x];,\n', [(2, {"a": [{"x": 1}], "b": "[x]", "c, d": ","})]),
        ("a.csv", b"", []),
        ("a.txt", "Grüße\n \t\n  indented\r\n".encode(), [(1, "Grüße"), (3, "  indented")]),
    ],
)
def test_rows_and_their_lines(tmp_path: Path, name: str, content: bytes, rows: list[tuple[int, Any]]) -> None:
    assert list(read_rows(written(tmp_path / name, content))) == rows
    assert list(read_rows(written(tmp_path / f"{name}.gz", gzip.compress(content)))) == rows


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "deleted": number % 2 == 0} for number in range(3000)]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == list(enumerate(rows, 1))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"x": 1}\n\n{"x": \n',
            ":3: expected a JSON value, found '{\"x\":' (Expecting value at column 7)",
        ),
        ("a.jsonl", b"hello\n", ":1: expected a JSON value, found 'hello' (Expecting value at column 1)"),
        (
            "a.json",
            b'[\n1,\n{"x"}\n]',
            ":3: expected a JSON value, found '{\"x\"}' (Expecting ':' delimiter at column 5)",
        ),
        ("a.json", b"[1\n] 2", ":2: expected a JSON value, found '] 2' (Extra data at column 3)"),
        ("a.txt", b"fine\nca\xe9\n", ":2: expected UTF-8 text, found byte 0xe9 at 2"),
        ("a.jsonl", b"[" * 100_000, ":1: expected a JSON value, found one too large ("),
        ("a.jsonl", b"1" * 5_000, ":1: expected a JSON value, found one too large ("),
        ("a.txt.gz", b"plain text", ":1: expected gzip data, found a broken file (Not a gzipped file"),
        ("a.parquet", b"plain text", ":1: expected parquet, found: "),
        ("a.xlsx", b"a,b", ": expected a file ending in .jsonl, "),
        ("a.csv", b'a,b\n1,"2\n"\n3\n', ":4: expected 2 cells, as in the first line, found 1"),
        ("a.csv", b'a,b\n1,"2\n3,4\n', ":2: expected csv, found: unexpected end of data"),
        ("a.csv", b"a\n[{'role': 'user'}]\n", ":2: column 'a': expected messages as JSON, found '[{'role': 'user'}]'"),
    ],
)
def test_malformed_rows_are_blamed_on_their_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = written(tmp_path / name, content)
    assert error_of(path).startswith(f"{path}{message}")


def test_broken_gzip_is_an_error_after_the_rows_that_came_out(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps(f"text {n}").encode() + b"\n" for n in range(2000)))
    path = written(tmp_path / "cut.jsonl.gz", whole[: len(whole) // 2])
    seen: list[tuple[int, str]] = []
    with pytest.raises(UserError) as caught:
        seen.extend(read_rows(path))
    assert 0 < len(seen) < 2000
    assert seen == [(n + 1, f"text {n}") for n in range(len(seen))]
    assert str(caught.value).startswith(f"{path}:{len(seen) + 1}: expected gzip data, found a broken file (")
    flipped = written(tmp_path / "flipped.jsonl.gz", whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:])
    assert error_of(flipped).startswith(f"{flipped}:2001: expected gzip data, found a broken file (CRC")


def test_fetch_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    names = ["b.jsonl", "a/c.jsonl.gz", "a/b.jsonl", "a/readme.md", ".cache/x.jsonl", "a/._b.jsonl"]
    for name in names:
        written(tmp_path / name, b"")
    patterns = ["*.jsonl", "*.jsonl.gz"]
    assert fetch(str(tmp_path), patterns) == [tmp_path / name for name in ("a/b.jsonl", "a/c.jsonl.gz", "b.jsonl")]
    assert fetch(str(tmp_path), ["a/*.jsonl"]) == [tmp_path / "a/b.jsonl"]
    assert fetch(str(tmp_path / "a/readme.md"), patterns) == [tmp_path / "a/readme.md"]


def test_fetch_errors_name_the_source(tmp_path: Path) -> None:
    with pytest.raises(UserError) as missing:
        fetch(str(tmp_path / "no.jsonl"), ["*.jsonl"])
    assert str(missing.value).startswith(f"{tmp_path}/no.jsonl: expected a file, a folder or a hub id")
    with pytest.raises(UserError) as empty:
        fetch(str(tmp_path), ["*.jsonl", "*.txt"])
    assert str(empty.value) == f"{tmp_path}: expected files matching *.jsonl or *.txt, found none"


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local/folder").mkdir(parents=True)
    assert is_hub_id("Anthropic/hh-rlhf")
    for source in (
        "local/folder",
        "data/pairs.jsonl",
        "./x",
        "../x",
        "/x/y",
        "a/b/c",
        "name",
        "a b/c",
        "a/",
        "",
    ):
        assert not is_hub_id(source), source


def test_text_fields() -> None:
    assert text_field({"a": "ü😀"}, "a", "f:1") == "ü😀"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "nothing"),
        ({"a": None}, "null"),
        ({"a": 3}, "int"),
        ({"a": []}, "a list"),
    ]
    for row, found in wrong:
        with pytest.raises(UserError) as caught:
            text_field(row, "a", "f:1")
        assert str(caught.value) == f"f:1: field 'a': expected text, found {found}"
    with pytest.raises(UserError, match=r"^f:2: expected Unicode text, found the lone surrogate \\ud800$"):
        checked_text(json.loads(r'"a\ud800"'), "f:2")
