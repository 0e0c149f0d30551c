"""Where a reward model is right, and whether it knows more than length and words do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from rlhf.data.hh_rlhf import Pair
from rlhf.data.splits import text_key
from rlhf.file_types import Accuracy, Audit, Baseline

Array = NDArray[Any]


def audit(train: Sequence[Pair], test: Sequence[Pair], chosen: ArrayLike, rejected: ArrayLike) -> Audit:
    """Accuracy by subset, by length and by margin; against baselines; length in the scores; leaked prompts.

    chosen, rejected: float [N], the scores of the N test pairs' sides. Lengths are words of the response. A tie
    counts half in every accuracy; intervals are Wilson's at 95 %.
    """
    chosen, rejected = np.asarray(chosen, float), np.asarray(rejected, float)
    margin = chosen - rejected
    right = _right(margin)
    words = np.array([[len(text.split()) for text in (pair.chosen, pair.rejected)] for pair in test])
    longer = words[:, 0] - words[:, 1]
    subset = np.array([pair.source.split("/")[0] for pair in test])
    by_length = np.select([longer > 0, longer < 0], ["chosen is longer", "rejected is longer"], "equally long")
    by_margin = np.array(["small", "middle", "large"])[_third(np.abs(margin))]
    baselines = {
        "longer response": _right(longer),
        "shorter response": _right(-longer),
        "bag of words": _right(bag_of_words(train, test)),
    }
    return {
        "groups": {
            "subset": _by(subset, right),
            "length": _by(by_length, right),
            "size of margin": _by(by_margin, right),
        },
        "baselines": {name: _baseline(right, found) for name, found in baselines.items()},
        "length_correlation": _rank_correlation(words.T.ravel(), np.concatenate([chosen, rejected])),
        "leaked": leaked(train, test),
    }


def bag_of_words(train: Sequence[Pair], test: Sequence[Pair]) -> Array:
    """Margin, float [N], of a linear model of tf-idf words on the test pairs: logistic regression on differences.

    Each training pair is shown both ways round, so that the model has no side it prefers.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    vectorizer.fit([text for pair in train for text in (pair.chosen, pair.rejected)])

    def differences(pairs: Sequence[Pair]) -> Any:
        sides = [vectorizer.transform([getattr(pair, side) for pair in pairs]) for side in ("chosen", "rejected")]
        return sides[0] - sides[1]

    x = differences(train).toarray()
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(np.concatenate([x, -x]), np.repeat([1, 0], len(x)))
    return model.decision_function(differences(test))


def leaked(train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, int]:
    """Test pairs whose opening, and whose chosen response, is in the training pairs (white space and case aside)."""
    openings = {text_key(pair.opening) for pair in train}
    responses = {text_key(text) for pair in train for text in (pair.chosen, pair.rejected)}
    return {
        "opening": sum(text_key(pair.opening) in openings for pair in test),
        "chosen_response": sum(text_key(pair.chosen) in responses for pair in test),
    }


def _right(margin: Array) -> Array:
    return (np.sign(margin) + 1) / 2


def _third(values: Array) -> Array:
    """0, 1 or 2 for each value, by rank, about equally many of each."""
    ranks = np.empty(len(values), int)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks * 3 // len(values)


def _by(group: Array, right: Array) -> dict[str, Accuracy]:
    return {str(name): _accuracy(right[group == name]) for name in dict.fromkeys(group)}


def _accuracy(right: Array) -> Accuracy:
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(0.95, method="wilson")
    return {"n": len(right), "accuracy": float(right.mean()), "interval": [float(interval.low), float(interval.high)]}


def _baseline(right: Array, baseline: Array) -> Baseline:
    """The reward model against a baseline on the pairs where one is right and the other is not (sign test)."""
    better, worse = int((right > baseline).sum()), int((right < baseline).sum())
    p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return {**_accuracy(baseline), "better": better, "worse": worse, "p_value": float(p_value)}


def _rank_correlation(x: Array, y: Array) -> float | None:
    return None if np.ptp(x) == 0 or np.ptp(y) == 0 else float(spearmanr(x, y).statistic)
