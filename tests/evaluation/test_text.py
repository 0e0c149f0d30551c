"""Variety and repetition by hand."""

import pytest

from rlhf.evaluation.text import distinct, repetition


def test_distinct_counts_over_all_texts():
    texts = ["The cat", "the dog the dog"]  # words: the cat the dog the dog
    assert distinct(texts, 1) == pytest.approx(3 / 6)
    assert distinct(texts, 2) == pytest.approx(3 / 4)  # the-cat, the-dog, dog-the, the-dog


def test_no_words_have_no_variety():
    assert distinct(["", "one"], 2) is None


def test_repetition():
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repetition("a a a a a a") == pytest.approx(2 / 3)
    assert repetition("a b c") == 0
