"""What the documentation says of tests is so: every test it names is there, and every defect has its row."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "trl-defects.md").read_text(encoding="utf-8")
NAMED = sorted({(file, name) for file, name in re.findall(r"`([\w/.]*)::(\w+)`", TABLE)})


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[f"{file}-{name}" for file, name in NAMED])
def test_every_test_named_is_there(file, name):
    path = TESTS / ("test_ppo_invariants.py" if file == "inv" else file)
    assert path.is_file(), f"{file}: no such file"
    assert re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE), f"{name}: not in {file}"


def test_every_defect_has_one_row_with_a_test():
    rows = [line for line in TABLE.splitlines() if re.match(r"\| [AC]?\d+ \|", line)]
    names = [line.split("|")[1].strip() for line in rows]
    assert names == [f"A{i}" for i in range(1, 41)] + [f"C{i}" for i in range(1, 18)] + [str(i) for i in range(1, 16)]
    assert [line for line in rows if not re.search(r"`[\w/.]+::\w+`", line.split("|")[-2])] == []


def test_no_file_is_named_that_is_not_there():
    files = set(re.findall(r"`((?:\w+/)*test_\w+\.py)`", TABLE))
    assert [file for file in files if not (TESTS / file).is_file()] == []
