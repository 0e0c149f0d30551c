"""Files of a data source (a file, a folder or a data set on the hub), and their rows with line numbers.

A mistake in a file raises a `UserError` that starts with "FILE:LINE: ".
"""

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.config.caches import cache_error
from rlhf.errors import UserError, did_you_mean

MAX_LINE = 64 << 20  # bytes; rows of real data have less than one
MAX_RATIO, MAX_FREE = 100, 8 << 20  # text unpacks to about ten times its size; up to MAX_FREE bytes are not checked
_BOMB = f"expected {{}} of at most {MAX_RATIO} times the file's size, found more; unpack it first"

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".txt", ".txt.gz", ".csv", ".csv.gz", ".parquet", ".arrow")
_FORMATS = (("*.parquet", "*.arrow"), ("*.jsonl", "*.jsonl.gz", "*.json", "*.json.gz"), ("*",))  # of one data set
_NO_DATA = (  # of `datasets`, in folders that it saves
    *("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json", "cache-*.arrow", "tmp*.arrow"),
)

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_SOLID = re.compile(r"[^ \t\r\n,]")  # the first character of an array's next element
_KINDS = {type(None): "null", bool: "a boolean", str: "text", list: "a list", dict: "an object"}


def is_hub_id(source: str) -> bool:
    """Whether source is a hub data set: "owner/name", without a data file's ending, and no such local path."""
    looks_like_id = _HUB_ID.fullmatch(source) is not None and not source.endswith(DATA_SUFFIXES)
    return looks_like_id and not os.path.exists(source)  # unlike pathlib's, it accepts any name


DEMO = Path(__file__).parent / "demo"


def fetch(source: str, patterns: Sequence[str], revision: str | None = None) -> list[Path]:
    """Return the local files of source, sorted by their path in it.

    For a file, the file itself. For a folder, the files at any depth whose path in it matches one of patterns ("*"
    also matches "/"), without hidden files. For a hub data set, the same after downloading the matching files of
    revision (a commit, branch or tag; local sources ignore it); HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME apply.
    "demo:NAME" is a file of the data in this package. Raises UserError if there is no such source or no matching file.
    """
    try:
        path = DEMO / source.removeprefix("demo:") if source.startswith("demo:") else local_path(source)
        if path.is_file():
            return [path]
        if path.is_dir() and source.strip():  # an empty name would be the working folder
            return _matching(path, patterns, source)
    except OSError as error:
        raise UserError(f"{source[:200]}: expected a file, a folder or a hub id, found: {error.strerror}") from error
    if is_hub_id(source):
        return _matching(_download(source, patterns, revision), patterns, source)
    meant = did_you_mean(source, [f"demo:{path.name}" for path in DEMO.iterdir()])
    raise UserError(
        f"{source or repr(source)}: expected a file, a folder or a hub id like Anthropic/hh-rlhf, found no such path"
        f"{meant}"
    )


def fetch_data(
    source: str, patterns: Sequence[str], data_dir: str | None, revision: str | None, setting: str
) -> list[Path]:
    """The files of `fetch` in data_dir, a folder inside source or a pattern of its files; None for all of source.

    A hub data set often holds the same rows in several formats, and other texts beside: of parquet, JSON and the rest
    only the first that it has is returned. setting: the name of data_dir in the settings.
    """
    root, hub = local_path(source), is_hub_id(source)
    if data_dir is not None:
        pattern = any(letter in data_dir for letter in "*?[")
        leads_out = Path(data_dir).is_absolute() or ".." in Path(data_dir).parts
        if leads_out or not (hub or pattern or (root / data_dir).is_dir()):
            raise UserError(f"{source}: expected a folder '{data_dir}' in it ({setting}), found none")
        folder = data_dir.strip("/")
        if not hub and not pattern:
            return fetch(str(root / data_dir), patterns)
        patterns = [folder] if pattern else [f"{folder}/{one}" for one in patterns]
    files = fetch(source, patterns, revision)
    if not hub:
        return files
    return next(kept for one in _FORMATS if (kept := [p for p in files if any(fnmatch(p.name, x) for x in one)]))


def local_path(source: str) -> Path:
    """source as a path, with ~ expanded if possible."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def _matching(folder: Path, patterns: Sequence[str], source: str) -> list[Path]:
    files: dict[str, Path] = {}
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts) or any(fnmatch(path.name, x) for x in _NO_DATA)
        wanted = any(fnmatch(relative.as_posix(), pattern) for pattern in patterns)
        if wanted and not hidden and path.is_file():
            files[relative.as_posix()] = path
    if not files:
        raise UserError(f"{source}: expected files matching {' or '.join(patterns)}, found none")
    return [files[name] for name in sorted(files)]


def _download(repo_id: str, patterns: Sequence[str], revision: str | None) -> Path:
    # Imported here: it reads the HF_* variables on import, and local files do not need it.
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=list(patterns))
    # The client raises errors of unrelated kinds (its own, the HTTP library's, the disk's). The remedy is the same
    # for all, and the cause stays chained.
    except Exception as error:
        what = f"{type(error).__name__}: {one_line(str(error), 160)}"
        at = f" at revision '{revision}'" if revision else ""
        raise cache_error(error) or UserError(
            f"{repo_id}: expected a local path or a hub data set{at} that can be downloaded or is cached, "
            f"found neither ({what}); check the name, or run `rlhf prepare` on a machine with network"
        ) from error
    return Path(found)


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) for each row of a .jsonl, .json, .txt, .csv, .parquet or .arrow file.

    Those of text also as .gz. .jsonl: one JSON value per line. .json: the same, or one array, whose elements have the
    number of the line on which they start. .txt: each line is one str. .csv: dicts of texts, under the names of the
    first line; messages are JSON. .parquet, .arrow: dicts, numbered by row. Blank lines are skipped; a UTF-8 byte
    order mark and CRLF line ends are dropped. Raises UserError, with file and line, for anything malformed.
    """
    name = path.name.lower()
    if not name.endswith(DATA_SUFFIXES):
        raise UserError(f"{path}: expected a file ending in {', '.join(DATA_SUFFIXES)}, found '{path.name}'")
    if name.endswith(".parquet"):
        yield from _table_rows(path, _parquet_batches)
    elif name.endswith(".arrow"):
        yield from _table_rows(path, _arrow_batches)
    elif name.endswith((".txt", ".txt.gz")):
        yield from _lines(path)
    elif name.endswith((".csv", ".csv.gz")):
        yield from _csv_rows(path)
    elif name.endswith((".json", ".json.gz")):
        yield from _json_file_rows(path)
    else:
        yield from ((number, _parse(line, path, number)) for number, line in _lines(path))


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """Return row[name], which must be text; where ("file:line") starts the message of the UserError."""
    if name not in row:
        raise UserError(f"{where}: field '{name}': expected text, found nothing")
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{name}': expected text, found {kind(value)}")
    return checked_text(value, f"{where}: field '{name}'")


def checked_text(text: str, where: str) -> str:
    """Return text. Raises UserError for half a surrogate pair, which JSON can write but no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"{where}: expected Unicode text, found the lone surrogate {code}") from None
    return text


def kind(value: Any) -> str:
    """Return the name of a JSON value's type, for "expected ..., found ...": "text", "int", "null"."""
    return _KINDS.get(type(value), type(value).__name__)


def reasons(counts: dict[str, int], what: str, drops: Iterable[str]) -> str:
    """What was found if nothing is kept: "no row", or the number of rows and why they were dropped."""
    total = counts[f"{what}s"]
    dropped = ", ".join(f"{counts[name]} {name}" for name in drops if counts[name])
    return f"{total} {what}{'s' if total > 1 else ''} and a reason to drop each: {dropped}" if total else f"no {what}"


def one_line(text: str, limit: int = 40) -> str:
    """Return text on one line, truncated to limit characters with an ellipsis."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the non-blank lines without their ends."""
    return ((number, line.rstrip("\r\n")) for number, line in _all_lines(path) if line.strip())


def _all_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines, decoded one at a time so that an error names the line of a bad byte.

    Raises UserError, before memory or time run out, for a line of more than MAX_LINE bytes and for gzip data that
    unpack to more than MAX_FREE bytes and more than MAX_RATIO times their size.
    """
    number = unpacked = 0
    try:
        with path.open("rb") as packed, _unpacked(packed, path) as file:
            while raw := file.readline(MAX_LINE + 1):
                number, unpacked = number + 1, unpacked + len(raw)
                if unpacked > MAX_FREE and unpacked > MAX_RATIO * packed.tell():
                    raise UserError(f"{path}:{number}: {_BOMB.format('gzip data')}")
                if len(raw) > MAX_LINE:
                    found = f"of at most {MAX_LINE >> 20} MiB, found a longer one; write one row per line"
                    raise UserError(f"{path}:{number}: expected a line {found}")
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if "\0" in line:
                    raise UserError(f"{path}:{number}: expected text, found a NUL byte: is it UTF-16, or no text file?")
                yield number, line
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise UserError(f"{path}:{number}: expected UTF-8 text, found byte 0x{bad:02x} at {error.start}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        # number is that of the last complete line.
        raise UserError(f"{path}:{number + 1}: expected gzip data, found a broken file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, found: {error.strerror or error}") from None


def _unpacked(file: BinaryIO, path: Path) -> Any:
    return gzip.open(file) if path.name.lower().endswith(".gz") else nullcontext(file)


def _parse(text: str, path: Path, number: int) -> Any:
    """Parse text, which starts on line number of path."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        found = f"'{one_line(line)}' ({error.msg} at column {error.colno})"
        raise UserError(f"{path}:{number + error.lineno - 1}: expected a JSON value, found {found}") from None
    except (RecursionError, ValueError) as error:  # hundreds of levels deep; an int of thousands of digits
        raise UserError(f"{path}:{number}: expected a JSON value, found one too large ({error})") from None


def _json_file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    numbered = dict(_lines(path))
    if not next(iter(numbered.values()), "").lstrip().startswith("["):
        yield from ((number, _parse(line, path, number)) for number, line in numbered.items())
        return
    # Put blank lines back, so that line numbers in the text are those of the file.
    text = "\n".join(numbered.get(number, "") for number in range(1, max(numbered) + 1))
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1
    line += text.count("\n", 0, at)
    # Parsed twice: as a whole for its errors, and by element for the lines on which they start.
    for value in _parse(text, path, 1):
        start = next(_SOLID.finditer(text, at)).start()
        line += text.count("\n", at, start)
        yield line, value
        at = decoder.raw_decode(text, start)[1]
        line += text.count("\n", start, at)


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The cells of a table whose first line names the columns, between commas, semicolons or tabs."""
    csv.field_size_limit(MAX_LINE)
    lines = (line for _, line in _all_lines(path))
    first = next(lines, "")
    rows = csv.reader(chain([first], lines), delimiter=max(",;\t", key=first.count), strict=True)
    names: list[str] = []
    number = 1  # of the line on which a row starts
    try:
        for cells in rows:
            if names and cells:
                if len(cells) != len(names):
                    found = f"expected {len(names)} cells, as in the first line, found {len(cells)}"
                    raise UserError(f"{path}:{number}: {found}")
                where = f"{path}:{number}: column"
                yield number, {name: _cell(cell, f"{where} '{name}'") for name, cell in zip(names, cells, strict=True)}
            names, number = names or cells, rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{number}: expected csv, found: {error}") from None


def _cell(text: str, where: str) -> Any:
    """The text, or the messages that it holds."""
    if not re.match(r"\s*\[\s*\{", text):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: expected messages as JSON, found '{one_line(text)}'") from None


def _table_rows(path: Path, batches: Callable[[Path], Iterator[Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow  # here: it is slow to load, and most data are text

    number = 0
    try:
        for batch in batches(path):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        what = path.suffix[1:].lower()
        raise UserError(f"{path}:{number + 1}: expected {what}, found: {one_line(str(error), 160)}") from None


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _check_unpacked(path, file.metadata)
        yield from file.iter_batches(1024)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """The batches of a file that `datasets` has written: Arrow's stream format."""
    from pyarrow import ipc

    unpacked = 0
    with path.open("rb") as packed, ipc.open_stream(packed) as file:
        for batch in file:
            unpacked += batch.nbytes
            if unpacked > max(MAX_FREE, MAX_RATIO * path.stat().st_size):
                raise UserError(f"{path}: {_BOMB.format('arrow')}")
            yield batch


def _check_unpacked(path: Path, metadata: Any) -> None:
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if size > max(MAX_FREE, MAX_RATIO * path.stat().st_size):
        raise UserError(f"{path}: {_BOMB.format('parquet')}")
