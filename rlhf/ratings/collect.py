"""The sheets that raters return: each is checked against the key, then stored by rater."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import UserError, printable
from rlhf.file_types import RatedItem, RatingItem, RatingKey, Sheet
from rlhf.ratings.scale import CRITERIA, STEPS
from rlhf.storage.run_folder import write_json

MAX_BYTES = 4_000_000  # a filled sheet of 100 prompts is about half of this
MAX_RATERS = 200
_RATER_ID = re.compile(r"[0-9a-f]{32}")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a UserError that names the file otherwise."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: expected at most {MAX_BYTES:,} bytes, found {path.stat().st_size:,}")
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: expected a JSON file, found: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, found: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(record).__name__}")
    return record


def check_sheet(key: RatingKey, record: Mapping[str, Any], where: str) -> Sheet:
    """A rater's sheet, checked and ready to store: known fields only, `complete` counted again.

    A UserError that starts with `where` for a sheet of another key, missing or extra items, texts that differ from the
    sheet's, a rating that is not a whole number from 1 to 5, or a rater without a name.
    """
    if record.get("sheet_id") != key["sheet_id"]:
        raise UserError(f"{where}: sheet_id: expected {key['sheet_id']}, found {_short(record.get('sheet_id'))}")
    rater_id, rater = record.get("rater_id"), record.get("rater")
    if not (isinstance(rater_id, str) and _RATER_ID.fullmatch(rater_id)):
        raise UserError(f"{where}: rater_id: expected 32 hexadecimal digits, found {_short(rater_id)}")
    if not (isinstance(rater, str) and rater.strip() and len(rater) <= 100 and rater == printable(rater)):
        raise UserError(f"{where}: rater: expected a name or initials, found {_short(rater)}")
    found = record.get("items")
    if not isinstance(found, dict):
        raise UserError(f"{where}: items: expected an object, found {_short(found)}")
    expected = {item["item_id"]: item for item in key["items"]}
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())[0]
        what = "a response that is not on the sheet" if odd in found else "one of them missing"
        raise UserError(f"{where}: item {_short(odd)}: expected the sheet's {len(expected)} responses, found {what}")
    items = {name: _check_item(item, found[name], f"{where}: item {name}") for name, item in expected.items()}
    return {
        "sheet_id": key["sheet_id"],
        "rater_id": rater_id,
        "rater": rater.strip(),
        "complete": all(len(item["ratings"]) == len(CRITERIA) for item in items.values()),
        "items": items,
    }


def _check_item(item: RatingItem, found: Any, where: str) -> RatedItem:
    if not isinstance(found, dict) or not isinstance(found.get("ratings"), dict):
        raise UserError(f"{where}: expected an object with ratings, found {_short(found)}")
    for name, text in (("prompt", item["prompt"]), ("response", item["response"])):
        if found.get(name) != text:
            raise UserError(f"{where}: expected the sheet's {name}, found another text: {_short(found.get(name))}")
    for name, value in found["ratings"].items():
        if name not in CRITERIA:
            raise UserError(f"{where}: expected a rating of {', '.join(CRITERIA)}, found {_short(name)}")
        if type(value) is not int or value not in STEPS:
            raise UserError(f"{where}: {name}: expected a whole number from 1 to 5, found {_short(value)}")
    note = found.get("note", "")
    if not (isinstance(note, str) and len(note) <= 4000):
        raise UserError(f"{where}: note: expected a text of at most 4000 characters, found {_short(note)}")
    # JSON may hold half a surrogate pair, which no UTF-8 file can.
    return {"ratings": found["ratings"], "note": note.encode("utf-8", "replace").decode()}


def check_rater(sheet: Sheet, raters: dict[str, str], where: str) -> None:
    """A UserError if another rater has this name, or if there are too many raters. raters: rater_id -> name."""
    others = [name.casefold() for rater_id, name in raters.items() if rater_id != sheet["rater_id"]]
    if sheet["rater"].casefold() in others:
        raise UserError(f"{where}: rater: {sheet['rater']!r} has already returned a sheet; use another name")
    if len(others) >= MAX_RATERS:
        raise UserError(f"{where}: expected at most {MAX_RATERS} raters, found one more")


def store_sheet(folder: Path, sheet: Sheet) -> Path:
    """Write a checked sheet to folder/RATER_ID.json; it replaces an earlier one by the same rater."""
    path = folder / f"{sheet['rater_id']}.json"
    write_json(path, sheet)
    return path


def stored_sheets(key: RatingKey, folder: Path) -> list[Sheet]:
    """All stored sheets, by file name. A UserError for two with the same rater's name: one person counts once."""
    sheets: list[Sheet] = []
    names: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        sheet = _check_stored(key, read_object(path), path)
        name = sheet["rater"].casefold()
        if name in names:
            raise UserError(f"{path}: expected one sheet of {sheet['rater']!r}, found another in {names[name]}")
        names[name] = path
        sheets.append(sheet)
    return sheets


def _check_stored(key: RatingKey, sheet: Mapping[str, Any], path: Path) -> Sheet:
    """Check a stored sheet: it has no texts, so take them from the key."""
    items = sheet.get("items")
    if isinstance(items, dict):
        texts = {item["item_id"]: item for item in key["items"]}
        items = {
            name: {**item, **{"prompt": texts[name]["prompt"], "response": texts[name]["response"]}}
            for name, item in items.items()
            if isinstance(item, dict) and name in texts
        }
    return check_sheet(key, {**sheet, "items": items}, str(path))


def import_sheets(key: RatingKey, files: Sequence[Path], folder: Path) -> list[Sheet]:
    """Check all files, then store them, then return all stored sheets. If one file is bad, nothing is stored.

    A UserError for a second sheet of a rater, by id or name, with other ratings than the stored one.
    """
    stored = {sheet["rater_id"]: sheet for sheet in stored_sheets(key, folder)}
    names = {sheet["rater"].casefold(): sheet["rater_id"] for sheet in stored.values()}
    new: dict[str, Sheet] = {}
    for path in files:
        sheet = check_sheet(key, read_object(path), str(path))
        rater_id, name = sheet["rater_id"], sheet["rater"].casefold()
        if rater_id in new:
            raise UserError(f"{path}: expected one file per rater, found a second of {sheet['rater']!r}")
        if names.setdefault(name, rater_id) != rater_id:
            raise UserError(f"{path}: expected one sheet of {sheet['rater']!r}, found another by that name")
        earlier = stored.get(rater_id)
        if earlier and earlier["complete"] and earlier != sheet:
            raise UserError(f"{path}: expected one sheet of {sheet['rater']!r}, found another that is already stored")
        new[rater_id] = sheet
    for sheet in new.values():
        store_sheet(folder, sheet)
    return stored_sheets(key, folder)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
