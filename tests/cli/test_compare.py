"""Columns of responses in a terminal."""

from rlhf.cli.compare import side_by_side


def row(model, response, eos=True):
    return {"model": model, "response": response, "score": 1.25, "response_length": 7, "eos": eos}


def test_columns_by_hand():
    text = side_by_side([row("base", "one two three four five"), row("full", "a\n\nb", eos=False)], width=43)
    assert text.splitlines() == [
        "base  score +1.25  7   full  score +1.25  7",
        "tokens                 tokens (truncated)",
        "-" * 20 + "   " + "-" * 20,
        "one two three four     a",
        "five",
        " " * 23 + "b",
    ]


def test_a_response_does_not_steer_the_terminal():
    assert "\x1b" not in side_by_side([row("base", "red \x1b[31m\x07 text")], 80)
