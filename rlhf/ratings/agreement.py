"""Agreement between raters, and of each rater with their own earlier ratings."""

import numpy as np
from numpy.typing import ArrayLike

from rlhf.file_types import Consistency


def krippendorff_alpha(ratings: ArrayLike) -> float | None:
    """Krippendorff's alpha for ordinal values (Krippendorff 2011, "Computing Krippendorff's alpha-reliability").

    ratings: float [raters, units], nan for a missing rating. 1: full agreement, 0: as by chance, below 0: worse.
    Units with fewer than two ratings do not count. None if no unit is left, or if all values are equal.
    """
    x = np.asarray(ratings, float)
    values = np.unique(x[~np.isnan(x)])
    counts = np.array([[(unit == value).sum() for value in values] for unit in x.T], float)  # [units, values]
    counts = counts.reshape(-1, len(values))
    rated = counts.sum(1)
    counts, rated = counts[rated > 1], rated[rated > 1]
    if not len(counts):
        return None
    pairs = counts[:, :, None] * counts[:, None, :] - np.apply_along_axis(np.diag, 1, counts)
    coincidence = (pairs / (rated - 1)[:, None, None]).sum(0)
    totals = coincidence.sum(0)
    # Ordinal distance: the number of values between two, with the two counted as half.
    upto = np.cumsum(totals) - totals / 2
    distance = (upto[:, None] - upto[None, :]) ** 2
    expected = (totals[:, None] * totals[None, :] * distance).sum()
    if expected == 0:
        return None
    return float(1 - (totals.sum() - 1) * (coincidence * distance).sum() / expected)


def self_consistency(first: ArrayLike, again: ArrayLike) -> Consistency:
    """For N ratings that one rater gave twice: the share that is equal, and the mean absolute difference in steps."""
    difference = np.abs(np.asarray(first, float) - np.asarray(again, float))
    return {"n": len(difference), "same": float((difference == 0).mean()), "mean_difference": float(difference.mean())}
