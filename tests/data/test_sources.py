import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pytest
from datasets import Dataset
from pyarrow import parquet

from rlhf.data.hh_rlhf import SUBSETS, fetch_pairs
from rlhf.data.oasst import fetch_prompts
from rlhf.data.sources import (
    DATA_SUFFIXES,
    checked_text,
    fetch,
    fetch_data,
    is_hub_id,
    one_line,
    read_rows,
    text_field,
)
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


def test_a_table_between_tabs_is_read(tmp_path: Path) -> None:
    assert list(read_rows(written(tmp_path / "a.csv", b"a\tb,c\td\n1\t2,3\t4\n"))) == [
        (2, {"a": "1", "b,c": "2,3", "d": "4"})
    ]


@pytest.mark.parametrize("folder", ["/tmp", "..", "a/../..", "no"])
def test_a_folder_outside_its_source_is_refused(tmp_path: Path, folder: str) -> None:
    written(tmp_path / "source/a/b.txt", b"x")
    with pytest.raises(UserError, match=rf"source: expected a folder '{folder}' in it \(prompt_dir\), found none$"):
        fetch_data(str(tmp_path / "source"), ["*.txt"], folder, None, "prompt_dir")


def test_a_line_of_an_error_is_cut_to_its_limit() -> None:
    assert one_line("a\n b", 3) == "a b"
    assert one_line("abcd ef", 5) == "abcd…"


def test_files_beside_a_saved_data_set_are_no_data(tmp_path: Path) -> None:
    for name in ("dataset_info.json", "state.json", "cache-1.arrow", "tmp2.arrow", "a/dataset_dict.json", "a/b.json"):
        written(tmp_path / name, b"")
    assert fetch(str(tmp_path), ["*"]) == [tmp_path / "a/b.json"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Any]]:
    """A folder that stands for every data set of the hub, and what was asked of it."""
    asked: list[Any] = []

    def download(name: str, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, repo_type, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return tmp_path, asked


def test_of_a_hub_data_set_the_first_format_that_it_has_is_read(hub: tuple[Path, list[Any]]) -> None:
    folder, asked = hub
    patterns = [f"*{suffix}" for suffix in DATA_SUFFIXES]
    for name, kept in (("a/b.txt", "a/b.txt"), ("a/b.json.gz", "a/b.json.gz"), ("b.parquet", "b.parquet")):
        written(folder / name, b"")
        assert fetch_data("our/prefs", patterns, None, "v1", "data_dir") == [folder / kept]
    assert asked == [("our/prefs", "dataset", "v1", patterns)] * 3
    assert fetch_data("our/prefs", ["*.txt"], "a/", None, "data_dir") == [folder / "a/b.txt"]
    assert fetch_data("our/prefs", ["*.txt"], "a/*.json*", None, "data_dir") == [folder / "a/b.json.gz"]
    assert asked[3:] == [("our/prefs", "dataset", None, ["a/*.txt"]), ("our/prefs", "dataset", None, ["a/*.json*"])]
    with pytest.raises(UserError, match=r"^our/prefs: expected files matching \*\.csv, found none$"):
        fetch_data("our/prefs", ["*.csv"], None, None, "data_dir")
    with pytest.raises(UserError, match=r"^our/prefs: expected a folder '\.\./a' in it"):
        fetch_data("our/prefs", ["*.csv"], "../a", None, "data_dir")


def test_which_files_the_data_sets_of_the_papers_are(hub: tuple[Path, list[Any]]) -> None:
    folder, asked = hub
    for name in ("data/a.parquet", "b.jsonl", "red-team-attempts/c.jsonl", "helpful-base/d.csv"):
        written(folder / name, b"")
    assert fetch_pairs("Anthropic/hh-rlhf", None, "v2") == [folder / "helpful-base/d.csv"]
    assert [pattern for pattern in asked[-1][3] if pattern.endswith("*.jsonl.gz")] == [
        f"{subset}/*.jsonl.gz" for subset in SUBSETS
    ]
    assert asked[-1][2] == "v2"
    assert not [pattern for pattern in asked[-1][3] if ".txt" in pattern]
    assert fetch_pairs("Anthropic/hh-rlhf", "red-team-attempts", None) == [folder / "red-team-attempts/c.jsonl"]
    assert fetch_prompts(["OpenAssistant/oasst1"], "v3") == [folder / "data/a.parquet"]
    assert asked[-1] == ("OpenAssistant/oasst1", "dataset", "v3", ["data/*.parquet"])
    assert fetch_prompts(["OpenAssistant/oasst1", "our/prompts"], None, "*.jsonl") == [
        *[folder / "b.jsonl", folder / "red-team-attempts/c.jsonl"] * 2
    ]
    fetch_prompts(["our/prompts"], None)
    assert asked[-1][3] == [f"*{suffix}" for suffix in DATA_SUFFIXES]


def test_a_data_set_of_the_hub_may_call_a_folder_as_the_red_team_s(hub: tuple[Path, list[Any]]) -> None:
    folder, _ = hub
    written(folder / "red-team-attempts/c.jsonl", b"")
    assert fetch_pairs("our/pairs", None, None) == [folder / "red-team-attempts/c.jsonl"]


def test_only_the_red_teams_files_are_no_pairs(tmp_path: Path) -> None:
    written(tmp_path / "red-team-attempts/a.jsonl", b"")
    with pytest.raises(UserError, match=r": expected files of preference pairs, found only red-team-attempts$"):
        fetch_pairs(str(tmp_path), None, None)


@pytest.mark.parametrize(("revision", "at"), [("v9", " at revision 'v9'"), (None, "")])
def test_a_data_set_that_cannot_be_had_is_named_with_its_revision(
    monkeypatch: pytest.MonkeyPatch, revision: str | None, at: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise RuntimeError("no\nway")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        fetch("our/prefs", ["*"], revision)
    start = f"our/prefs: expected a local path or a hub data set{at} that can be downloaded or is cached, found neither"
    assert str(caught.value).startswith(f"{start} (RuntimeError: no way); check the name, or run `rlhf prepare`")


def test_the_whole_of_a_table_is_measured(tmp_path: Path) -> None:
    """Of parquet all groups of rows, of arrow all batches: each by itself is no bomb."""
    table = pyarrow.table({"a": ["x" * 1000] * 20_000})
    groups, batches = tmp_path / "a.parquet", tmp_path / "a.arrow"
    parquet.write_table(table, groups, row_group_size=4000, compression="gzip", use_dictionary=False)
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(batches, table.schema, options=options) as file:
        file.write_table(table, max_chunksize=4000)
    for path, kind in ((groups, "parquet"), (batches, "arrow")):
        assert error_of(path) == f"{path}: expected {kind} of at most 100 times the file's size, found more; " + (
            "unpack it first"
        )
