"""What responses look like as text: variety and repetition, in words split at white space, case ignored."""

from collections.abc import Sequence


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct-n: different n-grams of all texts, divided by all their n-grams (Li et al. 2016, arXiv:1510.03055).

    Falls with the amount of text, so it compares models on the same prompts. None where no text has n words.
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that it has had before (seq-rep-n, Welleck et al. 2020, arXiv:1908.04319).

    0 for a text of fewer than n words.
    """
    grams = _ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
