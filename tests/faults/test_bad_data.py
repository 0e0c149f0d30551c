"""Data files that are no data: pairs through train_reward.py, prompts through train_ppo.py."""

import gzip
import json
import os
import sys
from io import BytesIO
from pathlib import Path

import pyarrow
import pytest
import tiny
from bad_input import Asker, cases
from pyarrow import parquet

from rlhf.cli import train_ppo, train_reward
from rlhf.data.hh_rlhf import load_pairs
from rlhf.data.oasst import load_prompts

H, A = "\n\nHuman:", "\n\nAssistant:"
GOOD = json.dumps({"chosen": f"{H} q{A} a", "rejected": f"{H} q{A} b"}).encode()
PROMPT = {"message_id": "m", "message_tree_id": "t", "role": "prompter", "text": "x", "lang": "en", "deleted": False}
DEEP = b"[" * 100_000


def pair(chosen, rejected=f"{H} q{A} b") -> bytes:
    return json.dumps({"chosen": chosen, "rejected": rejected}).encode()


def prompt(**changes) -> bytes:
    return json.dumps({k: v for k, v in (PROMPT | changes).items() if v is not ...}).encode()


def bomb(unit: bytes) -> bytes:
    """gzip data of a gigabyte: many times the same part, packed once."""
    part = unit * ((16 << 20) // len(unit))
    return gzip.compress(part) * 64


def table(rows: dict, **options) -> bytes:
    file = BytesIO()
    parquet.write_table(pyarrow.table(rows), file, **options)
    return file.getvalue()


PAIRS = {
    "not json": ("p.jsonl", GOOD + b"\n{chosen: x}\n", "p.jsonl:2: expected a JSON value, found '{chosen: x}'"),
    "python's quotes": ("p.jsonl", b"{'chosen': 'x'}", "p.jsonl:1: expected a JSON value, found"),
    "half a row": ("p.jsonl", GOOD + b"\n" + GOOD[:30], "p.jsonl:2: expected a JSON value"),
    "two rows on a line": ("p.jsonl", GOOD + GOOD, "p.jsonl:1: expected a JSON value"),
    "a comma after a row": ("p.jsonl", GOOD + b",\n" + GOOD, "p.jsonl:1: expected a JSON value"),
    "a number": ("p.jsonl", b"5\n", "p.jsonl:1: expected an object with fields 'chosen' and 'rejected', found int"),
    "null": ("p.jsonl", b"null\n", "p.jsonl:1: expected an object with fields 'chosen' and 'rejected', found null"),
    "true": ("p.jsonl", b"true\n", "p.jsonl:1: expected an object with fields 'chosen' and 'rejected', found a boo"),
    "text": ("p.jsonl", b'"hello"\n', "p.jsonl:1: expected an object with fields 'chosen' and 'rejected', found text"),
    "an array a line": ("p.jsonl", b"[1, 2]\n", "p.jsonl:1: expected an object with fields 'chosen' and 'rejected'"),
    "rows in one array": ("p.jsonl", b"[" + GOOD + b"]", "p.jsonl:1: expected an object with fields 'chosen'"),
    "nan": ("p.jsonl", b"NaN", "p.jsonl:1: expected an object with fields 'chosen' and 'rejected', found float"),
    "nan as a side": (
        "p.jsonl",
        pair(float("nan")),
        "p.jsonl:1: field 'chosen': expected text or messages, found float",
    ),
    "infinity as a side": (
        "p.jsonl",
        pair(float("inf")),
        "p.jsonl:1: field 'chosen': expected text or messages, found float",
    ),
    "no fields": ("p.jsonl", b"{}", "p.jsonl:1: expected an object with fields 'chosen'"),
    "one side": ("p.jsonl", b'{"chosen": "x"}', "p.jsonl:1: expected an object with fields 'chosen'"),
    "names in capitals": ("p.jsonl", b'{"Chosen": "x"}', "p.jsonl:1: expected an object with fields 'chosen'"),
    "a null side": ("p.jsonl", pair(None), "p.jsonl:1: field 'chosen': expected text or messages, found null"),
    "no content": (
        "p.jsonl",
        pair([{"role": "user"}]),
        "field 'chosen': turn 1: field 'content': expected text, found",
    ),
    "an object side": (
        "p.jsonl",
        pair({"text": "x"}),
        "p.jsonl:1: field 'chosen': turn 1: field 'role': expected text",
    ),
    "half a surrogate pair": (
        "p.jsonl",
        GOOD + b'\n{"chosen": "x\\ud800", "rejected": "y"}',
        "p.jsonl:2: field 'chosen': expected Unicode text, found the lone surrogate \\ud800",
    ),
    "a raw nul": ("p.jsonl", GOOD + b"\n\0" + GOOD, "p.jsonl:2: expected text, found a NUL byte"),
    "nul bytes only": ("p.jsonl", bytes(5000), "p.jsonl:1: expected text, found a NUL byte"),
    "latin-1": ("p.jsonl", GOOD + b"\n" + pair("x").replace(b"x", b"\xe9"), "p.jsonl:2: expected UTF-8 text, found"),
    "utf-16": ("p.jsonl", GOOD.decode().encode("utf-16"), "p.jsonl:1: expected UTF-8 text, found byte 0xff at 0"),
    "utf-16 without a mark": ("p.jsonl", GOOD.decode().encode("utf-16-le"), "p.jsonl:1: expected text, found a NUL"),
    "utf-32": ("p.jsonl", GOOD.decode().encode("utf-32"), "p.jsonl:1: expected UTF-8 text, found byte 0xff at 0"),
    "binary": ("p.jsonl", bytes(range(128, 256)) * 20, "p.jsonl:1: expected UTF-8 text, found byte 0x80 at 0"),
    "a control character": ("p.jsonl", b'{"chosen": "\x1b[31m"}', ["p.jsonl:1: expected a JSON value", "\\x1b[31m"]),
    "deep": ("p.jsonl", GOOD + b"\n" + DEEP, "p.jsonl:2: expected a JSON value, found one too large"),
    "a deep side": ("p.jsonl", b'{"chosen": ' + DEEP, "p.jsonl:1: expected a JSON value, found one too large"),
    "a number of 5,000 digits": ("p.jsonl", b"1" * 5000, "p.jsonl:1: expected a JSON value, found one too large"),
    "a huge row": (
        "p.jsonl",
        GOOD + b'\n{"chosen": "' + b"x" * (65 << 20) + b'"}',
        "p.jsonl:2: expected a line of at most 64 MiB, found a longer one",
    ),
    "empty": ("p.jsonl", b"", "p.jsonl: expected preference pairs, found no row"),
    "blank lines": ("p.jsonl", b"\n \n\t\r\n\n", "p.jsonl: expected preference pairs, found no row"),
    "only a byte order mark": ("p.jsonl", b"\xef\xbb\xbf", "p.jsonl: expected preference pairs, found no row"),
    "only assistants": (
        "p.jsonl",
        b"\n".join([pair(f"{A} a", f"{A} b")] * 3),
        "p.jsonl: expected preference pairs, found 3 rows and a reason to drop each: 3 starts_with_assistant",
    ),
    "sides that are the same": (
        "p.jsonl",
        b"\n".join([pair(f"{H} q{A} b")] * 2),
        "p.jsonl: expected preference pairs, found 2 rows and a reason to drop each: 2 identical_responses",
    ),
    "all dropped": (
        "p.jsonl",
        b"\n".join([pair("plain"), pair(f"{H} q{A}"), pair(f"{H} q{A} "), pair(f"{H} other{A} b")]),
        "found 4 rows and a reason to drop each: 1 no_final_assistant, 2 empty_response, 1 prompts_differ",
    ),
    "too few": ("p.jsonl", GOOD, "not enough preference pairs for test and validation and train: expected"),
    "gzip cut short": ("p.jsonl.gz", gzip.compress(GOOD * 99)[:60], "p.jsonl.gz:1: expected gzip data, found a broken"),
    "gzip's head only": ("p.jsonl.gz", gzip.compress(GOOD)[:8], "p.jsonl.gz:1: expected gzip data, found a broken"),
    "no gzip": ("p.jsonl.gz", GOOD, "p.jsonl.gz:1: expected gzip data, found a broken file (Not a gzipped file"),
    "gzip with a wrong sum": (
        "p.jsonl.gz",
        gzip.compress(GOOD)[:-8] + bytes(8),
        "p.jsonl.gz:1: expected gzip data, found a broken file (CRC",
    ),
    "gzip without its name": ("p.jsonl", gzip.compress(GOOD), "p.jsonl:1: expected UTF-8 text, found byte 0x8b at 1"),
    "a bomb of one line": (
        "p.jsonl.gz",
        lambda: bomb(b" "),
        "p.jsonl.gz:1: expected gzip data of at most 100 times the file's size, found more; unpack it first",
    ),
    "a bomb of blank lines": (
        "p.jsonl.gz",
        lambda: bomb(b"\n"),
        "expected gzip data of at most 100 times the file's size, found more; unpack it first",
    ),
    "a bomb of rows": (
        "p.jsonl.gz",
        lambda: bomb(GOOD + b"\n"),
        "expected gzip data of at most 100 times the file's size, found more; unpack it first",
    ),
    "a table of an office program": ("p.xlsx", b"PK", "p.xlsx: expected a file ending in .jsonl, "),
    "a zip file": ("p.zip", b"PK\3\4", "p.zip: expected a file ending in .jsonl, "),
}
PROMPTS = {
    "not json": ("p.jsonl", b"hello there\n", "p.jsonl:1: expected a JSON value, found 'hello there'"),
    "a number": ("p.jsonl", b"7", "p.jsonl:1: expected a message (message_id"),
    "an array": ("p.jsonl", b'["x"]', "p.jsonl:1: expected a message (message_id"),
    "another object": ("p.jsonl", b'{"text": "x"}', "or one text, found an object with fields 'text'"),
    "a nameless object": ("p.jsonl", b"{}", "or one text, found an object with fields (none)"),
    "a field with escapes": ("p.jsonl", b'{"\\u001b[31m\\ud800": 1}', "found an object with fields '\\x1b[31m\\ud800'"),
    "no id": ("p.jsonl", prompt(message_id=...), "p.jsonl:1: field 'message_id': expected text, found nothing"),
    "a number as id": ("p.jsonl", prompt(message_id=4), "p.jsonl:1: field 'message_id': expected text, found int"),
    "no tree": ("p.jsonl", prompt(message_tree_id=...), "p.jsonl:1: field 'message_tree_id': expected text, found"),
    "no text": ("p.jsonl", prompt(text=None), "p.jsonl:1: field 'text': expected text, found null"),
    "another role": ("p.jsonl", prompt(role="system"), "field 'role': expected 'prompter' or 'assistant', found 'sys"),
    "a role of two lines": ("p.jsonl", prompt(role="a\nb"), "expected 'prompter' or 'assistant', found 'a b'"),
    "a list as role": ("p.jsonl", prompt(role=["prompter"]), "field 'role': expected text, found a list"),
    "deleted in words": ("p.jsonl", prompt(deleted="false"), "field 'deleted': expected true or false, found text"),
    "a number as language": ("p.jsonl", prompt(lang=1), "field 'lang': expected text, found int"),
    "half a surrogate pair": ("p.jsonl", b'"x\\udfff"', "p.jsonl:1: expected Unicode text, found the lone surrogate"),
    "a surrogate in the id": ("p.jsonl", prompt(message_id="\ud800"), "field 'message_id': expected Unicode text"),
    "replies that are no list": (
        "p.jsonl",
        json.dumps({"message_tree_id": "t", "prompt": PROMPT | {"replies": "x"}}).encode(),
        "p.jsonl:1: field 'replies': expected a list, found text",
    ),
    "a reply that is null": (
        "p.jsonl",
        json.dumps({"message_tree_id": "t", "prompt": PROMPT | {"replies": [None]}}).encode(),
        "p.jsonl:1: field 'replies': expected a list of objects, found null in it",
    ),
    "a tree without messages": (
        "p.jsonl",
        b'{"message_tree_id": "t", "prompt": {}}',
        "p.jsonl:1: field 'role': expected text, found nothing",
    ),
    "a deep tree": (
        "p.jsonl",
        b'{"message_tree_id": "t", "prompt": ' + b'{"replies": [' * 50_000,
        "p.jsonl:1: expected a JSON value, found one too large",
    ),
    "only assistants": (
        "p.jsonl",
        b"\n".join(prompt(role="assistant", message_id=str(n)) for n in range(3)),
        "p.jsonl: expected prompts, found 3 messages and a reason to drop each: 3 assistant",
    ),
    "another language": ("p.jsonl", prompt(lang="de"), "found 1 message and a reason to drop each: 1 other_language"),
    "empty": ("p.jsonl", b"", "p.jsonl: expected prompts, found no message"),
    "blank text": ("p.txt", b" \n\n\t\n", "p.txt: expected prompts, found no message"),
    "an empty array": ("p.json", b" [ ] ", "p.json: expected prompts, found no message"),
    "an array cut short": ("p.json", b'["a", "b"', "p.json:1: expected a JSON value"),
    "an array and more": ("p.json", b'["a"]\n["b"]\n', "p.json:2: expected a JSON value, found '[\"b\"]'"),
    "an array of arrays": ("p.json", b'["a",\n["b"]]', "p.json:2: expected a message"),
    "a binary text": ("p.txt", b"\x7fELF\x02\x01\x01\0", "p.txt:1: expected text, found a NUL byte"),
    "utf-16 text": ("p.txt", "hi".encode("utf-16"), "p.txt:1: expected UTF-8 text, found byte 0xff at 0"),
    "a text bomb": ("p.txt.gz", lambda: bomb(b"a"), "expected gzip data of at most 100 times"),
    "an array bomb": ("p.json.gz", lambda: bomb(b"[\n"), "expected gzip data of at most 100 times"),
    "no parquet": ("p.parquet", b"PAR1", "p.parquet:1: expected parquet, found: "),
    "an empty parquet": ("p.parquet", b"", "p.parquet:1: expected parquet, found: "),
    "parquet cut short": ("p.parquet", table({"text": ["x"]})[:-40], "p.parquet:1: expected parquet, found: "),
    "parquet of other columns": ("p.parquet", table({"x": [1]}), "found an object with fields 'x'"),
    "parquet of bytes": (
        "p.parquet",
        table({name: [value] for name, value in (PROMPT | {"text": b"\xff"}).items()}),
        "p.parquet:1: field 'text': expected text, found bytes",
    ),
    "a parquet bomb": (
        "p.parquet",
        lambda: table({"text": ["x" * (200 << 20)]}, compression="zstd", use_dictionary=False),
        "p.parquet: expected parquet of at most 100 times the file's size, found more; unpack it first",
    ),
    "too few": ("p.txt", b"one\ntwo\n", "not enough prompts (2 trees)"),
    "too long": ("p.txt", b"word " * 900, "max_prompt_length: all 1 prompts have more than 256 tokens; raise it"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and a reward model, as options."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("base", tiny.gpt2()), ("reward", tiny.gpt2_reward())):
        model.save_pretrained(folder / name)
        tiny.gpt2_tokenizer().save_pretrained(folder / name)
    reward = ["--model_name_or_path", folder / "base", "--dataset_name"]
    ppo = ["--model_name_or_path", folder / "base", "--reward_model_path", folder / "reward", "--prompt_dataset"]
    return {train_reward.main: reward, train_ppo.main: ppo}


@pytest.fixture
def ask(models, tmp_path, capsys, monkeypatch):
    asker = Asker(tmp_path, capsys, monkeypatch)

    def asked(main, source, words):
        return asker(main, "--runs_dir", tmp_path / "runs", "--use_cpu", "true", *models[main], source, words=words)

    return asked


def written(folder: Path, name: str, content) -> Path:
    (folder / name).write_bytes(content() if callable(content) else content)
    return folder / name


@pytest.mark.parametrize(("name", "content", "words"), PAIRS.values(), ids=PAIRS)
def test_pairs(ask, tmp_path, name, content, words):
    ask(train_reward.main, written(tmp_path, name, content), words)


@pytest.mark.parametrize(("name", "content", "words"), PROMPTS.values(), ids=PROMPTS)
def test_prompts(ask, tmp_path, name, content, words):
    ask(train_ppo.main, written(tmp_path, name, content), words)


SOURCES = {
    "a missing path": ("no/where/p.jsonl", "no/where/p.jsonl: expected a file, a folder or a hub id"),
    "no name": ("", "expected a file, a folder or a hub id"),
    "blanks": ("  ", "expected a file, a folder or a hub id"),
    "nobody's home": ("~nobody-of-that-name/p.jsonl", "~nobody-of-that-name/p.jsonl: expected a file, a folder or"),
    "a name too long": ("x" * 5000, "expected a file, a folder or a hub id"),
    "an unknown demo": ("demo:none.jsonl", "demo:none.jsonl: expected a file, a folder or a hub id"),
    "a device": ("/dev/zero", "/dev/zero: expected a file, a folder or a hub id"),
    "an address": ("https://example.org/p.jsonl", "https://example.org/p.jsonl: expected a file, a folder or a hub"),
    "a name of two lines": ("a\nb.jsonl", "a b.jsonl: expected a file"),
}


@cases(SOURCES)
@pytest.mark.parametrize("main", [train_reward.main, train_ppo.main], ids=["pairs", "prompts"])
def test_sources(ask, main, given, words):
    ask(main, given, words)


@pytest.mark.parametrize("main", [train_reward.main, train_ppo.main], ids=["pairs", "prompts"])
def test_folders_and_links(ask, tmp_path, main):
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    ask(main, folder, "folder.jsonl: expected files matching")
    (folder / "readme.md").write_text("no data")
    (folder / "lost.jsonl").symlink_to(tmp_path / "nowhere")
    (folder / "round.jsonl").symlink_to("round.jsonl")
    ask(main, folder, "folder.jsonl: expected files matching")
    ask(main, folder / "round.jsonl", "round.jsonl: expected a file")


@pytest.mark.skipif(sys.platform != "linux", reason="wants a file that fails to be read, which only /proc has")
@pytest.mark.parametrize("main", [train_reward.main, train_ppo.main], ids=["pairs", "prompts"])
def test_a_file_whose_reading_fails(ask, tmp_path, main):
    (tmp_path / "p.jsonl").symlink_to("/proc/self/mem")
    ask(main, tmp_path / "p.jsonl", "p.jsonl: expected a readable file, found: Input/output error")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("main", [train_reward.main, train_ppo.main], ids=["pairs", "prompts"])
def test_a_file_without_permission(ask, tmp_path, main):
    path = written(tmp_path, "p.jsonl", GOOD)
    path.chmod(0)
    ask(main, path, "p.jsonl: expected a readable file, found: Permission denied")


# What is odd and no mistake is read.
FINE = {
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "lines of windows": GOOD + b"\r\n\r\n",
    "no last line end": GOOD,
    "more fields": GOOD[:-1] + b', "score": NaN, "meta": {"x": [1]}}',
    "escapes": GOOD.replace(b"Human", b"\\u0048uman").replace(b"\\n", b"\\u000a"),
    "a field twice": GOOD[:-1] + b', "x": 1, "x": 2}',
}


@pytest.mark.parametrize("content", FINE.values(), ids=FINE)
def test_odd_files_that_are_fine(tmp_path, content):
    [pair], counts = load_pairs(str(written(tmp_path, "p.jsonl", content)))
    assert (pair.opening, pair.chosen, pair.rejected) == ("q", "a", "b")
    assert counts["kept"] == counts["rows"] == 1


def test_ids_that_come_twice_and_parents_in_a_circle(tmp_path):
    rows = [
        prompt(message_id="a", parent_id="b", text="one"),
        prompt(message_id="b", parent_id="a", text="two"),
        prompt(message_id="a", parent_id="a", text="three"),
        prompt(message_id="c", text="nul \0 and \x1b are characters"),
    ]
    prompts, counts = load_prompts([str(written(tmp_path, "p.jsonl", b"\r\n".join(rows)))])
    assert [p.text for p in prompts] == ["one", "two", "nul \0 and \x1b are characters"]
    assert (counts["kept"], counts["duplicate"]) == (3, 1)
