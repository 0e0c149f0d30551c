"""Variety and repetition of responses, by words (in scripts without blanks by characters), ignoring case."""

from collections.abc import Sequence

from rlhf.data.words import words


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct-n: different n-grams of all texts, divided by all their n-grams (Li et al. 2016, arXiv:1510.03055).

    It falls with the amount of text: compare models on the same prompts only. None if no text has n words.
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that occurred earlier in it (seq-rep-n, Welleck et al. 2020, arXiv:1908.04319).

    0 for a text of fewer than n words.
    """
    grams = _ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    found = words(text.lower())
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
