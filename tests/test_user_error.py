"""A UserError is one line that a terminal shows as it is, whatever it quotes."""

import pytest

from rlhf.errors import UserError


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a.txt: expected x, found  two blanks", "a.txt: expected x, found  two blanks"),
        ("ü…×’ 日本", "ü…×’ 日本"),
        ("two\nlines\r\nor\u2028three", "two lines  or three"),
        ("\x1b[31mred\x07 \ud800 \0", "\\x1b[31mred\\x07 \\ud800 \\x00"),
    ],
)
def test_one_line(message, line):
    assert str(UserError(message)) == line
    assert isinstance(UserError(message), ValueError)
