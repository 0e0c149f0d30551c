"""An audit of a reward model: its accuracy by group, and against baselines that use length or words only."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from rlhf.data.hh_rlhf import Pair
from rlhf.data.splits import text_key
from rlhf.data.words import TOKEN_PATTERN, words
from rlhf.file_types import Accuracy, Audit, Baseline
from rlhf.reward.metrics import rank_correlation, wilson_interval

Array = NDArray[Any]


def audit(train: Sequence[Pair], test: Sequence[Pair], chosen: ArrayLike, rejected: ArrayLike) -> Audit:
    """Accuracy by subset, length and margin; comparison with baselines; correlation with length; leaked prompts.

    chosen, rejected: float [N], scores of the two sides of the N test pairs. Lengths are `words` of the response. Ties
    count half in every accuracy; intervals are 95 % Wilson intervals.
    """
    chosen, rejected = np.asarray(chosen, float), np.asarray(rejected, float)
    margin = chosen - rejected
    right = _right(margin)
    lengths = np.array([[len(words(text)) for text in (pair.chosen, pair.rejected)] for pair in test])
    longer = lengths[:, 0] - lengths[:, 1]
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
        "length_correlation": rank_correlation(lengths.T.ravel(), np.concatenate([chosen, rejected])),
        "leaked": leaked(train, test),
    }


def bag_of_words(train: Sequence[Pair], test: Sequence[Pair]) -> Array:
    """Margins, float [N], of a linear model on the test pairs: logistic regression on differences of tf-idf words.

    Each training pair is used in both orders, so that the model does not prefer a side.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=TOKEN_PATTERN)
    vectorizer.fit([text for pair in train for text in (pair.chosen, pair.rejected)])

    def differences(pairs: Sequence[Pair]) -> Any:
        sides = [vectorizer.transform([getattr(pair, side) for pair in pairs]) for side in ("chosen", "rejected")]
        return sides[0] - sides[1]

    x = differences(train).toarray()
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(np.concatenate([x, -x]), np.repeat([1, 0], len(x)))
    return model.decision_function(differences(test))


def leaked(train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, int]:
    """Test pairs whose opening, or chosen response, occurs in the training pairs, ignoring white space and case."""
    openings = {text_key(pair.opening) for pair in train}
    responses = {text_key(text) for pair in train for text in (pair.chosen, pair.rejected)}
    return {
        "opening": sum(text_key(pair.opening) in openings for pair in test),
        "chosen_response": sum(text_key(pair.chosen) in responses for pair in test),
    }


def _right(margin: Array) -> Array:
    return (np.sign(margin) + 1) / 2


def _third(values: Array) -> Array:
    """0, 1 or 2 for each value, by rank, in thirds of about equal size."""
    ranks = np.empty(len(values), int)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks * 3 // len(values)


def _by(group: Array, right: Array) -> dict[str, Accuracy]:
    return {str(name): _accuracy(right[group == name]) for name in dict.fromkeys(group)}


def _accuracy(right: Array) -> Accuracy:
    n = len(right)
    return {"n": n, "accuracy": float(right.mean()), "interval": wilson_interval(right.sum(), n)}


def _baseline(right: Array, baseline: Array) -> Baseline:
    """Sign test of the reward model against a baseline, on the pairs where exactly one of them is right."""
    better, worse = int((right > baseline).sum()), int((right < baseline).sum())
    p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return {**_accuracy(baseline), "better": better, "worse": worse, "p_value": float(p_value)}
