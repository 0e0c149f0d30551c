"""Is a gain real? Checks by a second reward model, by response length, and for degenerate responses."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import linregress, t

from rlhf.evaluation.statistics import paired_gain
from rlhf.file_types import EndingEffect, GainAtEqualLength, ResponseRow, Validity
from rlhf.reward.metrics import rank_correlation

ResponseRows = Sequence[ResponseRow]


def validity(base: ResponseRows, tuned: ResponseRows, confidence: float, seed: int) -> Validity:
    """Evidence for and against the gain of a tuned model, from both models' rows, prompt by prompt.

    Rows have score, response, response_length (tokens) and, if a second reward model scored them too, gold_score.
    `gold`: the second model's gain as in `paired_gain`, and `in_sd`, in standard deviations of its scores of the base
    model's responses; `proxy_in_sd`: the same for the first reward model; `agreement`: Spearman's correlation of the
    two reward models' differences.
    """
    score, length = _differences(base, tuned, "score"), _differences(base, tuned, "response_length")
    record: Validity = {
        "length": without_length(score, length, confidence),
        "same_response": most_common_share([row["response"] for row in tuned]),
        "empty": float(np.mean([not row["response"].strip() for row in tuned])),
    }
    if all("gold_score" in row for row in (*base, *tuned)):
        before, after = ([row["gold_score"] for row in rows] for rows in (base, tuned))
        record["gold"] = {
            **paired_gain(before, after, confidence, seed),
            "in_sd": _in_sd(before, after),
        }
        record["proxy_in_sd"] = _in_sd([row["score"] for row in base], [row["score"] for row in tuned])
        record["agreement"] = rank_correlation(score, _differences(base, tuned, "gold_score"))
    return record


def without_length(score: ArrayLike, length: ArrayLike, confidence: float) -> GainAtEqualLength | None:
    """The gain at equal length: least squares of score on length, both float [N] differences.

    `slope`: reward units per token; `gain`: the line's value at a length difference of 0; each with its t interval.
    None for fewer than three prompts, or if all length differences are equal.
    """
    y, x = np.asarray(score, float), np.asarray(length, float)
    if len(x) < 3 or np.ptp(x) == 0:
        return None
    line = linregress(x, y)
    half = float(t.ppf((1 + confidence) / 2, len(x) - 2))
    return {
        "mean_difference": float(x.mean()),
        "slope": float(line.slope),
        "slope_interval": _around(line.slope, half * line.stderr),
        "gain": float(line.intercept),
        "interval": _around(line.intercept, half * line.intercept_stderr),
    }


def ending_effect(models: Sequence[ResponseRows], confidence: float) -> EndingEffect | None:
    """By how much a response that ends scores higher than a truncated one of the same model, with its t interval.

    Least squares of score on `eos` with a mean for each model, so that a model which scores higher and ends more often
    does not count as an effect of ending. None if no model has both kinds, or if no degree of freedom is left.
    """
    groups = [([r["score"] for r in rows if r["eos"]], [r["score"] for r in rows if not r["eos"]]) for rows in models]
    groups = [(ended, truncated) for ended, truncated in groups if ended and truncated]
    freedom = sum(len(ended) + len(truncated) for ended, truncated in groups) - len(groups) - 1
    if not groups or freedom < 1:
        return None
    weights = [len(ended) * len(truncated) / (len(ended) + len(truncated)) for ended, truncated in groups]
    differences = [float(np.mean(ended) - np.mean(truncated)) for ended, truncated in groups]
    difference = float(np.average(differences, weights=weights))
    # What least squares leaves: the spread within each kind, and that of the models' differences around their mean.
    squares = sum(len(x) * float(np.var(x)) for pair in groups for x in pair)
    squares += sum(w * (d - difference) ** 2 for w, d in zip(weights, differences, strict=True))
    error = float(np.sqrt(squares / freedom / sum(weights)))
    return {
        "ended": sum(len(ended) for ended, _ in groups),
        "truncated": sum(len(truncated) for _, truncated in groups),
        "difference": difference,
        "interval": _around(difference, float(t.ppf((1 + confidence) / 2, freedom)) * error),
    }


def most_common_share(texts: Sequence[str]) -> float:
    """Share, 0 to 1, of the texts that equal the most common one, ignoring white space at the ends."""
    return Counter(text.strip() for text in texts).most_common(1)[0][1] / len(texts)


def _differences(
    base: ResponseRows, tuned: ResponseRows, key: Literal["score", "gold_score", "response_length"]
) -> NDArray[np.float64]:
    return np.array([after[key] - before[key] for before, after in zip(base, tuned, strict=True)], float)


def _in_sd(before: ArrayLike, after: ArrayLike) -> float | None:
    """Mean gain in standard deviations of the scores before, so that two reward models can be compared."""
    x, y = np.asarray(before, float), np.asarray(after, float)
    spread = float(x.std(ddof=1)) if len(x) > 1 else 0.0
    return float((y - x).mean()) / spread if spread > 0 else None


def _around(middle: float, half: float) -> list[float]:
    return [float(middle - half), float(middle + half)]
