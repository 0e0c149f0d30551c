"""Returned sheets count once, complete and unaltered, or are refused with a one-line error."""

import copy
import json

import pytest
import rating_sheets

from rlhf.errors import UserError
from rlhf.ratings.collect import (
    MAX_BYTES,
    MAX_RATERS,
    check_rater,
    check_sheet,
    import_sheets,
    read_object,
    store_sheet,
    stored_sheets,
)

KEY = rating_sheets.key()
ITEM = KEY["items"][0]["item_id"]


def write(folder, name, record):
    path = folder / name
    path.write_text(json.dumps(record))
    return path


def altered(change):
    record = copy.deepcopy(rating_sheets.filled(KEY, "Ann"))
    change(record)
    return record


def test_a_sheet_is_stored_without_what_does_not_belong_to_it(tmp_path):
    record = rating_sheets.filled(KEY, " Ann ") | {"more": "x" * 99}
    sheet = check_sheet(KEY, record, "a.json")
    assert sheet["rater"] == "Ann"
    assert sheet["complete"]
    assert "more" not in sheet
    assert set(sheet["items"][ITEM]) == {"ratings", "note"}
    assert store_sheet(tmp_path, sheet).name == f"{record['rater_id']}.json"
    assert stored_sheets(KEY, tmp_path) == [sheet]


def test_complete_is_counted_not_believed():
    record = altered(lambda r: r["items"][ITEM]["ratings"].pop("relevance"))
    assert record["complete"]
    assert not check_sheet(KEY, record, "a.json")["complete"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(sheet_id="other"), "a.json: sheet_id: expected .* found 'other'"),
        (lambda r: r.update(rater="  "), "rater: expected a name"),
        (lambda r: r.update(rater_id="../../etc"), "rater_id: expected 32 hexadecimal"),
        (lambda r: r.update(items=[]), "items: expected an object"),
        (lambda r: r["items"].pop(ITEM), "found one of them missing"),
        (lambda r: r["items"].update(new={}), "a response that is not on the sheet"),
        (lambda r: r["items"][ITEM].update(response="better"), "the sheet's response, found another text"),
        (lambda r: r["items"][ITEM].update(prompt=None), "the sheet's prompt, found another text: None"),
        (lambda r: r["items"][ITEM].pop("prompt"), "the sheet's prompt, found another text: None"),
        (lambda r: r["items"][ITEM].pop("response"), "the sheet's response, found another text: None"),
        (lambda r: r["items"][ITEM].update(ratings=[5]), "expected an object with ratings"),
        (lambda r: r["items"][ITEM]["ratings"].update(coherence=6), "coherence: expected a whole number from 1 to 5"),
        (lambda r: r["items"][ITEM]["ratings"].update(coherence=True), "coherence: expected a whole number"),
        (lambda r: r["items"][ITEM]["ratings"].update(coherence=2.0), "coherence: expected a whole number"),
        (lambda r: r["items"][ITEM]["ratings"].update(beauty=3), "expected a rating of coherence, .* found 'beauty'"),
        (lambda r: r["items"][ITEM].update(note=7), "note: expected a text"),
        (lambda r: r["items"][ITEM].update(note="x" * 4001), "note: expected a text of at most 4000 characters"),
        (lambda r: r.update(rater="x" * 101), "rater: expected a name"),
        (lambda r: r.update(rater="A\nnn"), "rater: expected a name"),
        (lambda r: r.update(rater_id="0" * 33), "rater_id: expected 32 hexadecimal"),
    ],
)
def test_a_sheet_that_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        check_sheet(KEY, altered(change), "a.json")


def test_the_longest_that_is_taken_and_half_a_character(tmp_path):
    record = altered(lambda r: r["items"][ITEM].update(note="x" * 4000)) | {"rater": "x" * 100}
    record["items"][KEY["items"][1]["item_id"]]["note"] = "a\ud800"
    sheet = check_sheet(KEY, record, "a.json")
    assert (len(sheet["rater"]), len(sheet["items"][ITEM]["note"])) == (100, 4000)
    assert sheet["items"][KEY["items"][1]["item_id"]]["note"] == "a?"
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(MAX_BYTES)
    with pytest.raises(UserError, match=r"a\.json: expected JSON"):  # it was read
        read_object(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"of another sheet": {"ratings": {}}}, "responses, found one of them missing"),
        ({ITEM: 5}, "one of them missing"),
    ],
)
def test_a_stored_file_that_is_no_sheet_of_this_key_is_named(tmp_path, items, message):
    path = store_sheet(tmp_path, check_sheet(KEY, rating_sheets.filled(KEY, "Ann"), ""))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"items": items}))
    with pytest.raises(UserError, match=f"^{path}: item .*{message}"):
        stored_sheets(KEY, tmp_path)


def test_names_are_the_same_in_capitals(tmp_path):
    ann, other = (rating_sheets.filled(KEY, name, number=n) for n, name in ((1, "Ann"), (2, "ANN")))
    import_sheets(KEY, [write(tmp_path, "a.json", ann)], tmp_path / "store")
    with pytest.raises(UserError, match="found another by that name"):
        import_sheets(KEY, [write(tmp_path, "b.json", other)], tmp_path / "store")
    sheets = [check_sheet(KEY, one, "") for one in (ann, other)]
    check_rater(sheets[0], {sheets[0]["rater_id"]: "Ann"}, "sheet")  # who sends it again
    with pytest.raises(UserError, match="'ANN' has already returned a sheet"):
        check_rater(sheets[1], {sheets[0]["rater_id"]: "Ann"}, "sheet")
    store_sheet(tmp_path / "store", sheets[1])
    with pytest.raises(UserError, match=r"expected one sheet of 'A(nn|NN)', found another in "):
        stored_sheets(KEY, tmp_path / "store")


def test_files_are_joined_and_may_be_imported_again(tmp_path):
    store = tmp_path / "store"
    ann = write(tmp_path, "a.json", rating_sheets.filled(KEY, "Ann", 4))
    bob = write(tmp_path, "b.json", rating_sheets.filled(KEY, "Bob", 2, number=2))
    assert [s["rater"] for s in import_sheets(KEY, [ann], store)] == ["Ann"]
    assert [s["rater"] for s in import_sheets(KEY, [ann, bob], store)] == ["Ann", "Bob"]


def test_a_sheet_that_was_incomplete_may_come_again_complete(tmp_path):
    half = altered(lambda r: r["items"][ITEM]["ratings"].clear())
    store = tmp_path / "store"
    assert not import_sheets(KEY, [write(tmp_path, "a.json", half)], store)[0]["complete"]
    whole = write(tmp_path, "b.json", rating_sheets.filled(KEY, "Ann"))
    assert [s["complete"] for s in import_sheets(KEY, [whole], store)] == [True]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (rating_sheets.filled(KEY, "Ann", 3), "one file per rater, found a second"),
        (rating_sheets.filled(KEY, "ANN", 3, number=2), "found another by that name"),
    ],
)
def test_doubled_sheets_are_refused_and_nothing_is_stored(tmp_path, second, message):
    files = [write(tmp_path, "a.json", rating_sheets.filled(KEY, "Ann")), write(tmp_path, "b.json", second)]
    with pytest.raises(UserError, match=message):
        import_sheets(KEY, files, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_other_ratings_of_a_complete_sheet_do_not_replace_it(tmp_path):
    store = tmp_path / "store"
    import_sheets(KEY, [write(tmp_path, "a.json", rating_sheets.filled(KEY, "Ann", 4))], store)
    with pytest.raises(UserError, match="found another that is already stored"):
        import_sheets(KEY, [write(tmp_path, "b.json", rating_sheets.filled(KEY, "Ann", 5))], store)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\0", '"text"', "[" * 100_000])
def test_a_file_that_is_no_sheet(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.json: expected"):
        read_object(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(UserError, match="expected at most 4,000,000 bytes"):
        read_object(path)


def test_two_hundred_raters_and_none_more():
    raters = {f"{i:032x}": f"rater {i}" for i in range(1, MAX_RATERS)}
    sheet = {"rater_id": f"{MAX_RATERS:032x}", "rater": "Ann"}
    check_rater(sheet, raters, "sheet")
    raters[sheet["rater_id"]] = "Ann"
    check_rater(sheet, raters, "sheet")  # again: she is one of the 200
    with pytest.raises(UserError, match="sheet: expected at most 200 raters, found one more"):
        check_rater(sheet | {"rater_id": f"{201:032x}", "rater": "Bob"}, raters, "sheet")
    with pytest.raises(UserError, match="sheet: rater: 'RATER 7' has already returned a sheet"):
        check_rater({"rater_id": f"{8:032x}", "rater": "RATER 7"}, raters, "sheet")
