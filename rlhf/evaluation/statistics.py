"""Means and paired gains over prompts, with intervals and p-values."""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap, norm, permutation_test, t

from rlhf.file_types import PairedGain

RESAMPLES = 9999
POWER = 0.8  # probability of showing a gain that is there, at a two-sided level of 1 - confidence


def mean_interval(values: ArrayLike, confidence: float, seed: int) -> tuple[float, list[float]]:
    """Mean of N values and its bootstrap interval [low, high], the expanded percentile one.

    Plain percentiles are too near for few values: of 10 normal ones they hold the mean in 91 % of cases and not in 95.
    These are taken as far out as Student's t is (Hesterberg 2015, arXiv:1411.5279, section 5.3). The interval of one
    value, or of equal values, has no width. A ValueError for no values, or for one not finite.
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
        confidence_level=_expanded(confidence, len(x)),
        method="percentile",
        batch=1000,  # the default draws all resamples at once: 800 MB for 10 000 values
        rng=np.random.default_rng(seed),
    )
    return mean, [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def _expanded(confidence: float, n: int) -> float:
    """The share of the resamples' means between the percentiles that make an interval of this confidence."""
    return float(1 - 2 * norm.cdf(math.sqrt(n / (n - 1)) * t.ppf((1 - confidence) / 2, n - 1)))


def paired_gain(before: ArrayLike, after: ArrayLike, confidence: float, seed: int) -> PairedGain:
    """Mean before, after and gain over the same prompts, the gain's interval, and how often `after` wins.

    before, after: float [N], in the same order of prompts. The bootstrap resamples prompts, so pairs stay together.
    The win rate counts a tie as half a win. `detectable`: the gain that N prompts can show; `prompts_needed`: the
    prompts that can show a gain of this size; both with a power of 80 %.
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
        "detectable": detectable_gain(y - x, confidence),
        "prompts_needed": prompts_needed(y - x, confidence, gain),
    }


def detectable_gain(differences: ArrayLike, confidence: float) -> float | None:
    """The mean difference that the N prompts of float [N] can show with a power of 80 %; None for fewer than two.

    It is (z_(1 - alpha/2) + z_power) s / sqrt(N) for a paired comparison, s the standard deviation of the differences.
    """
    x = np.asarray(differences, float)
    return None if len(x) < 2 else _z(confidence) * float(np.std(x, ddof=1)) / math.sqrt(len(x))


def prompts_needed(differences: ArrayLike, confidence: float, gain: float) -> int | None:
    """Prompts needed to show a mean difference of `gain` with a power of 80 %, from differences float [N].

    None for fewer than two prompts, and for a gain of 0, which no number of prompts can show.
    """
    x = np.asarray(differences, float)
    if len(x) < 2 or gain == 0:
        return None
    return math.ceil((_z(confidence) * float(np.std(x, ddof=1)) / gain) ** 2)


def _z(confidence: float) -> float:
    return float(norm.ppf((1 + confidence) / 2) + norm.ppf(POWER))


def paired_p_value(differences: ArrayLike, seed: int) -> float:
    """Two-sided p-value of a mean difference other than 0, by flipping the signs of the pairs' differences.

    differences: float [N]. All 2^N flips if there are fewer than 9999, otherwise 9999 drawn with `seed`.
    """
    x = np.asarray(differences, float)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"differences: expected at least one, all finite, found {x.tolist()[:5]}")
    if len(x) < 2 or not x.any():  # of one pair both flips are as far out
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
