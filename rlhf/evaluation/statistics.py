"""Means and paired gains over prompts, with intervals and p-values."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap, permutation_test

from rlhf.file_types import PairedGain

RESAMPLES = 9999


def mean_interval(values: ArrayLike, confidence: float, seed: int) -> tuple[float, list[float]]:
    """Mean of N values and its bootstrap percentile interval [low, high].

    The interval of one value, or of equal values, has no width. A ValueError for no values, or for one not finite.
    """
    x = np.asarray(values, float)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"values: expected at least one, all finite, found {x.tolist()[:5]}")
    mean = float(x.mean())
    if len(x) < 2 or np.ptp(x) == 0:
        return mean, [mean, mean]
    result = bootstrap(
        (x,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        batch=1000,  # the default draws all resamples at once: 800 MB for 10 000 values
        rng=np.random.default_rng(seed),
    )
    return mean, [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def paired_gain(before: ArrayLike, after: ArrayLike, confidence: float, seed: int) -> PairedGain:
    """Mean before, after and gain over the same prompts, the gain's interval, and how often `after` wins.

    before, after: float [N], in the same order of prompts. The bootstrap resamples prompts, so pairs stay together.
    The win rate counts a tie as half a win.
    """
    x, y = np.asarray(before, float), np.asarray(after, float)
    if x.shape != y.shape:
        raise ValueError(f"paired scores: expected equally many, found {x.shape} and {y.shape}")
    gain, interval = mean_interval(y - x, confidence, seed)
    wins, ties, losses = (int(count) for count in ((y > x).sum(), (y == x).sum(), (y < x).sum()))
    return {
        "before": float(x.mean()),
        "after": float(y.mean()),
        "gain": gain,
        "interval": interval,
        "p_value": paired_p_value(y - x, seed),
        "win_rate": (wins + ties / 2) / len(x),
        "wins": wins,
        "ties": ties,
        "losses": losses,
    }


def paired_p_value(differences: ArrayLike, seed: int) -> float:
    """Two-sided p-value of a mean difference other than 0, by flipping the signs of the pairs' differences.

    differences: float [N]. All 2^N flips if there are fewer than 9999, otherwise 9999 drawn with `seed`.
    """
    x = np.asarray(differences, float)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"differences: expected at least one, all finite, found {x.tolist()[:5]}")
    if not x.any():
        return 1.0
    result = permutation_test(
        (x,),
        lambda sample, axis: np.mean(sample, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
