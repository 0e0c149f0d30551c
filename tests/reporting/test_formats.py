"""How numbers, times and paths are written."""

import math

import pytest

from rlhf.reporting.formats import duration, ends, flat, num, percent, short, signed, with_ends


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (num(1234567), "1,234,567"),
        (num(1234.5678), "1,234.568"),
        (num(1234.5678, 1), "1,234.6"),
        (num(0.01), "0.010"),
        (num(0.0099999), "0.01"),
        (num(-0.0012345), "-0.00123"),
        (num(0.0), "0.000"),
        (num(0), "0"),
        (num(None), "–"),
        (num(math.nan), "nan"),
        (num(True), "True"),
        (num("text"), "text"),
        (signed(0.5), "+0.500"),
        (signed(0.0), "0.000"),
        (signed(-0.5), "-0.500"),
        (signed(None), "–"),
        (percent(0.1234), "12.3%"),
        (percent(1), "100.0%"),
        (percent(None), "–"),
        (duration(59.94), "59.9 s"),
        (duration(60), "1 min 00 s"),
        (duration(185.4), "3 min 05 s"),
        (duration(3599.4), "59 min 59 s"),
        (duration(3599.6), "1 h 00 min"),
        (duration(7645), "2 h 07 min"),
        (duration(None), "–"),
        (ends([0.5, -1.0]), "[0.500,\u00a0-1.000]"),
        (ends((0.5, 0.75), percent), "[50.0%,\u00a075.0%]"),
        (ends(None), "–"),
        (with_ends(0.5, [0.25, 0.75], signed), "+0.500 [+0.250,\u00a0+0.750]"),
        (with_ends(0.5, None, percent), "50.0%"),
        (short("/home/me/a.yaml"), "…/a.yaml"),
        (short("see ~/runs/x, '/a/b/c' and https://a.b/c/d"), "see …/x, '…/c' and https://a.b/c/d"),
        (short("a/b/c"), "a/b/c"),
        (short(3), "3"),
    ],
)
def test_one_style_everywhere(text: str, expected: str) -> None:
    assert text == expected


def test_the_leaves_of_a_record_in_its_order() -> None:
    record = {"a": 1, "b": {"c": {"d": None, 3: [4]}, "e": {}}, "f": "x"}
    assert list(flat(record)) == [("a", 1), ("b.c.d", None), ("b.c.3", [4]), ("b.e", {}), ("f", "x")]
