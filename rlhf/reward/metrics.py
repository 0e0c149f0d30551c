"""Metrics of a reward model on pairs: accuracy, margin, confusion matrix and calibration."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from scipy.stats import binomtest, spearmanr

from rlhf.file_types import Calibration, CalibrationBin, PairMetrics

LABELS = ("first", "second")
_BINS = 10


def pair_metrics(chosen: NDArray[Any], rejected: NDArray[Any], seed: int) -> PairMetrics:
    """Accuracy with its 95 % Wilson interval, mean margin, confusion matrix, report and calibration.

    chosen, rejected: float [N], scores of the two sides. Each pair is put into a random order by `seed`, so that both
    classes occur: the label is the side of the chosen response, the prediction the side with the higher score (a tie:
    "second"). Ties count half in the accuracy. A ValueError for no pairs, or for a score that is not finite.
    """
    from sklearn.metrics import classification_report, confusion_matrix  # a second, which the report does not spend

    chosen, rejected = np.asarray(chosen, float), np.asarray(rejected, float)
    if chosen.shape != rejected.shape or chosen.ndim != 1 or not len(chosen):
        raise ValueError(f"scores: expected two arrays [N], N > 0, found {chosen.shape} and {rejected.shape}")
    bad = np.flatnonzero(~np.isfinite(chosen) | ~np.isfinite(rejected))
    if len(bad):
        raise ValueError(f"pair {bad[0]}: expected finite scores, found {chosen[bad[0]]} and {rejected[bad[0]]}")
    n, margin = len(chosen), chosen - rejected
    right = float((margin > 0).sum() + 0.5 * (margin == 0).sum())
    chosen_first = np.random.default_rng(seed).random(n) < 0.5
    first_minus_second = np.where(chosen_first, margin, -margin)
    label = np.where(chosen_first, *LABELS)
    predicted = np.where(first_minus_second > 0, *LABELS)
    return {
        "n": n,
        "accuracy": right / n,
        "accuracy_interval": wilson_interval(right, n),
        "mean_margin": float(margin.mean()),
        "labels": list(LABELS),
        "confusion_matrix": confusion_matrix(label, predicted, labels=list(LABELS)).tolist(),
        "classification_report": classification_report(
            label, predicted, labels=list(LABELS), output_dict=True, zero_division=0
        ),
        "calibration": calibration(expit(first_minus_second), chosen_first),
    }


def wilson_interval(right: float, n: int) -> list[float]:
    """The 95 % Wilson interval [low, high] of an accuracy of right / n; a half, from a tie, is dropped."""
    interval = binomtest(int(right), n).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float | None:
    """Spearman's rank correlation of two float [N]; None if one of them does not vary."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


def calibration(probability: NDArray[Any], outcome: NDArray[Any]) -> Calibration:
    """Reliability of P(first is better), float [N], against bool [N]: bins by confidence, and their ECE.

    Confidence: probability of the predicted side, 0.5 to 1, in ten bins of equal width. The expected calibration error
    (ECE) is the mean gap between confidence and accuracy, weighted by the number of pairs in a bin (Guo et al. 2017,
    arXiv:1706.04599). A probability of exactly 0.5 predicts no side and counts as half correct.
    """
    confidence = np.maximum(probability, 1 - probability)
    correct = np.where(probability == 0.5, 0.5, (probability > 0.5) == outcome)
    place = np.minimum(((confidence - 0.5) / 0.5 * _BINS).astype(int), _BINS - 1)
    bins: list[CalibrationBin] = [
        {
            "confidence": float(confidence[at].mean()),
            "accuracy": float(correct[at].mean()),
            "n": int(at.sum()),
        }
        for at in (place == i for i in range(_BINS))
        if at.any()
    ]
    gap = sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins)
    return {"ece": gap / len(probability), "bins": bins}
