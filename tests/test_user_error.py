"""A UserError is one line that a terminal shows as it is, whatever it quotes."""

import pytest

from rlhf.errors import UserError, did_you_mean, printable


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


@pytest.mark.parametrize(
    ("found", "meant"),
    [
        ("lorra", "'Lora'"),
        ("LORA", "'Lora'"),
        ("bf", "'bf16'"),  # short words may be less alike
        ("bf1xx", ""),
        ("seed", "'eval_seed' or 'prompt_seed'"),
        ("size", ""),  # three end with it
        ("", ""),
        (None, ""),
    ],
)
def test_what_may_be_meant(found, meant):
    known = ("Lora", "bf16", "eval_seed", "prompt_seed", "first_size", "second_size", "third_size")
    assert did_you_mean(found, known) == (f"; did you mean {meant}?" if meant else "")


def test_joiners_and_kept_characters_stay():
    assert printable("a\u200cb\u200dc\u202e\t\x1b", keep="\t") == "a\u200cb\u200dc\\u202e\t\\x1b"
