"""Variety and repetition by hand."""

import pytest

from rlhf.data.words import words
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


@pytest.mark.parametrize(
    "text",
    ["我不知道。", "わかりません。", "ワカリマセン。", "ฉันไม่รู้", "ຂ້ອຍບໍ່ຮູ້", "ខ្ញុំមិនដឹង", "ကျွန်တော်မသိပါ", "不知道 "],
)
def test_a_script_without_blanks_is_split_into_characters(text):
    n = len(text.strip())
    assert words(f"Ja: {text} no1") == ["Ja:", *text.strip(), "no1"]
    assert words(f"ok{text.strip()}ok") == ["ok", *text.strip(), "ok"]
    assert repetition(text.strip() * 12) == pytest.approx(1 - n / (12 * n - 3))  # as many 4-grams as places to begin
    assert distinct([text.strip()] * 4, 2) == pytest.approx(1 / 4)


def test_elsewhere_words_are_what_white_space_separates():
    text = "Tiếng Việt\u00a0là\x1cgì?\n 한국어 문장, русский हिन्दी  العربية e.g. x"
    assert words(text) == text.split()
