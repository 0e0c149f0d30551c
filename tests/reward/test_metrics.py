"""Reward metrics against numbers worked by hand."""

import json
import math

import numpy as np
import pytest

from rlhf.reward.metrics import calibration, pair_metrics

KEYS = {
    "n",
    "accuracy",
    "accuracy_interval",
    "mean_margin",
    "labels",
    "confusion_matrix",
    "classification_report",
    "calibration",
}


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_hand_worked_pairs() -> None:
    # Margins 1, 2, -1, 0: two right, one wrong, one tie.
    result = pair_metrics(np.array([2.0, 3.0, 0.0, 1.0]), np.array([1.0, 1.0, 1.0, 1.0]), seed=0)
    assert set(result) == KEYS
    assert result["n"] == 4
    assert result["accuracy"] == pytest.approx(2.5 / 4)
    assert result["mean_margin"] == pytest.approx(0.5)
    assert json.loads(json.dumps(result)) == result


def test_wilson_interval() -> None:
    # 8 of 10: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964
    low, high = pair_metrics(np.repeat([1.0, -1.0], [8, 2]), np.zeros(10), seed=0)["accuracy_interval"]
    z, p, n = 1.959964, 0.8, 10
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert low == pytest.approx((middle - half) / (1 + z**2 / n), abs=1e-6)
    assert high == pytest.approx((middle + half) / (1 + z**2 / n), abs=1e-6)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)


def test_confusion_matrix_counts_sides() -> None:
    right, wrong = 70, 30
    result = pair_metrics(np.repeat([2.0, -1.0], [right, wrong]), np.zeros(100), seed=5)
    (ff, fs), (sf, ss) = result["confusion_matrix"]
    assert result["labels"] == ["first", "second"]
    assert ff + ss == right
    assert fs + sf == wrong
    assert min(ff + fs, sf + ss) > 30  # both sides exist
    report = result["classification_report"]
    assert report["first"]["recall"] == pytest.approx(ff / (ff + fs))
    assert report["second"]["precision"] == pytest.approx(ss / (fs + ss))
    assert report["second"]["support"] == sf + ss
    assert report["accuracy"] == pytest.approx(0.7)


def test_rows_are_the_true_side() -> None:
    # Every prediction is wrong, so whatever stands first is predicted as second: nothing on the diagonal.
    result = pair_metrics(np.zeros(9), np.ones(9), seed=1)
    order = np.random.default_rng(1).random(9) < 0.5
    assert result["confusion_matrix"] == [[0, int(order.sum())], [int((~order).sum()), 0]]
    assert result["accuracy"] == 0


def test_seed_sets_the_order_only() -> None:
    rng = np.random.default_rng(7)
    chosen, rejected = rng.normal(0.5, 1, 200), rng.normal(0, 1, 200)
    one, again, other = (pair_metrics(chosen, rejected, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one["confusion_matrix"] != other["confusion_matrix"]
    assert one["accuracy"] == other["accuracy"]
    assert one["calibration"]["ece"] == pytest.approx(other["calibration"]["ece"])


def test_calibration_by_hand() -> None:
    # Confidence 0.72 twice, right once; 0.97 twice, right twice; 0.72 lies in [0.70, 0.75), 0.97 in [0.95, 1].
    probability = np.array([0.72, 0.28, 0.97, 0.03])
    outcome = np.array([True, True, True, False])
    result = calibration(probability, outcome)
    low, high = result["bins"]
    assert low == {"confidence": pytest.approx(0.72), "accuracy": 0.5, "n": 2}
    assert high == {"confidence": pytest.approx(0.97), "accuracy": 1.0, "n": 2}
    assert result["ece"] == pytest.approx(0.5 * 0.22 + 0.5 * 0.03)


def test_calibration_of_pairs() -> None:
    # P(chosen better) 0.72, 0.28, 0.97: confidence 0.72 (right), 0.72 (wrong), 0.97 (right), in whatever order shown.
    margins = np.array([logit(p) for p in (0.72, 0.28, 0.97)])
    result = pair_metrics(margins, np.zeros(3), seed=3)["calibration"]
    assert [(b["n"], b["accuracy"]) for b in result["bins"]] == [(2, 0.5), (1, 1.0)]
    assert result["ece"] == pytest.approx((2 * 0.22 + 0.03) / 3)


def test_calibrated_scores_have_little_error() -> None:
    rng = np.random.default_rng(11)
    probability = rng.uniform(size=50_000)
    result = calibration(probability, rng.uniform(size=50_000) < probability)
    assert len(result["bins"]) == 10
    assert sum(b["n"] for b in result["bins"]) == 50_000
    assert result["ece"] < 0.015


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ties_and_certainty(seed: int) -> None:
    ties = pair_metrics(np.ones(4), np.ones(4), seed=seed)
    assert ties["accuracy"] == 0.5
    assert [row[0] for row in ties["confusion_matrix"]] == [0, 0]  # all are predicted to be second
    assert ties["calibration"] == {"ece": 0, "bins": [{"confidence": 0.5, "accuracy": 0.5, "n": 4}]}
    sure = pair_metrics(np.full(4, 1e4), np.zeros(4), seed=seed)
    assert sure["calibration"] == {"ece": 0, "bins": [{"confidence": 1.0, "accuracy": 1.0, "n": 4}]}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match="pair 2: expected finite scores"):
        pair_metrics(np.ones(4), np.array([0, 0, bad, 0]), seed=0)


def test_shapes() -> None:
    with pytest.raises(ValueError, match=r"found \(3,\) and \(1,\)"):
        pair_metrics(np.ones(3), np.ones(1), seed=0)
    with pytest.raises(ValueError, match="N > 0"):
        pair_metrics(np.ones(0), np.ones(0), seed=0)
