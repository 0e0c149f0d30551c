"""How well scores tell the better response from the worse."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binomtest
from sklearn.metrics import classification_report, confusion_matrix

from rlhf.file_types import Calibration, CalibrationBin, PairMetrics

LABELS = ("first", "second")
_BINS = 10


def pair_metrics(chosen: NDArray[Any], rejected: NDArray[Any], seed: int) -> PairMetrics:
    """Accuracy with its 95 % Wilson interval, mean margin, confusion matrix, report and calibration.

    chosen, rejected: float [N], scores of the two sides. Each pair is shown in a random order by `seed`, so
    that both classes exist: the label says on which side the chosen response stands, the prediction which
    side scores higher (a tie: "second"). Ties count half in the accuracy. No pairs, or a score that is not
    finite, is a ValueError.
    """
    chosen, rejected = np.asarray(chosen, float), np.asarray(rejected, float)
    if chosen.shape != rejected.shape or chosen.ndim != 1 or not len(chosen):
        raise ValueError(f"scores: expected two arrays [N], N > 0, found {chosen.shape} and {rejected.shape}")
    bad = np.flatnonzero(~np.isfinite(chosen) | ~np.isfinite(rejected))
    if len(bad):
        raise ValueError(f"pair {bad[0]}: expected finite scores, found {chosen[bad[0]]} and {rejected[bad[0]]}")
    n, margin = len(chosen), chosen - rejected
    right = float((margin > 0).sum() + 0.5 * (margin == 0).sum())
    # Wilson's interval is one of whole counts: half a tie is dropped, which can only lower it.
    interval = binomtest(int(right), n).proportion_ci(0.95, method="wilson")
    chosen_first = np.random.default_rng(seed).random(n) < 0.5
    first_minus_second = np.where(chosen_first, margin, -margin)
    label = np.where(chosen_first, *LABELS)
    predicted = np.where(first_minus_second > 0, *LABELS)
    return {
        "n": n,
        "accuracy": right / n,
        "accuracy_interval": [float(interval.low), float(interval.high)],
        "mean_margin": float(margin.mean()),
        "labels": list(LABELS),
        "confusion_matrix": confusion_matrix(label, predicted, labels=list(LABELS)).tolist(),
        "classification_report": classification_report(
            label, predicted, labels=list(LABELS), output_dict=True, zero_division=0
        ),
        "calibration": calibration(expit(first_minus_second), chosen_first),
    }


def calibration(probability: NDArray[Any], outcome: NDArray[Any]) -> Calibration:
    """Reliability of P(first is better), float [N], against bool [N]: bins by confidence, and their ECE.

    Confidence is that in the predicted side, 0.5 to 1, in ten bins of equal width. The expected calibration
    error is the mean gap between confidence and accuracy, weighted by the pairs in a bin (Guo et al. 2017,
    arXiv:1706.04599). At a probability of exactly 0.5 there is no predicted side: half correct.
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
