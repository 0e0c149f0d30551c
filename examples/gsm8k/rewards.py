"""A reward for GSM8K (Cobbe et al. 2021, arXiv:2110.14168): 1 for the right number, 0 for any other answer."""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number(text):
    """The number after the last ####, or None."""
    found = NUMBER.search(text.rpartition("####")[2]) if "####" in text else None
    return float(found.group().replace(",", "")) if found else None


def right(completions, answer, **_):
    """answer: GSM8K's column, whose last line is `#### NUMBER`."""
    pairs = zip(completions, answer, strict=True)
    return [float(final_number(said[0]["content"]) == final_number(want)) for said, want in pairs]
