"""Every wrong line of the list is noticed by the tests beside it."""

import pytest
from mutants.lines import LINES, ROOT, survivors


def test_each_line_is_in_its_file_once_and_its_tests_exist():
    for one in LINES:
        assert (ROOT / "rlhf" / one.file).read_text(encoding="utf-8").count(one.line) == 1, one
        assert all((ROOT / "tests" / name).exists() for name in one.tests.split()), one


@pytest.mark.nightly
def test_each_wrong_line_is_noticed():
    assert survivors(LINES) == []
