"""Before, after and gain, with intervals; paired over prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap, permutation_test, spearmanr

from rlhf.evaluation.text import distinct, repetition

RESAMPLES = 9999


def mean_interval(values: ArrayLike, confidence: float, seed: int) -> tuple[float, list[float]]:
    """Mean of N values and its bootstrap percentile interval [low, high].

    One value, or equal ones, have an interval of no width. No values, or one that is not finite, is a ValueError.
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


def paired_gain(before: ArrayLike, after: ArrayLike, confidence: float, seed: int) -> dict[str, Any]:
    """Mean before, after and gain over the same prompts, the gain's interval, and how often `after` wins.

    before, after: float [N], prompt by prompt. Prompts are resampled, so each difference stays whole. The
    win rate counts a tie as half a win.
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

    differences: float [N]. All 2^N flips where they are fewer than 9999, else 9999 drawn by `seed`.
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


def summarise(rows: Sequence[dict[str, Any]], models: Sequence[str], confidence: float, seed: int) -> dict[str, Any]:
    """evaluation.json from response rows; gains are those of each model over the first.

    rows: one for each (prompt_id, model), with response, score (reward units), prompt_length and response_length
    (tokens), eos (bool), and kl (nats) or not.
    Rows of other models are left out. A (prompt_id, model) that is there twice, is missing for some model, or has
    a score that is not finite, is a ValueError that names it.
    """
    by_key: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (row for row in rows if row["model"] in models):
        key = (row["prompt_id"], row["model"])
        if key in by_key:
            raise ValueError(f"responses: expected one row for {key}, found two")
        if not np.isfinite(row["score"]):
            raise ValueError(f"responses: expected a finite score for {key}, found {row['score']}")
        by_key[key] = row
    prompts = list(dict.fromkeys(prompt_id for prompt_id, _ in by_key))
    if not prompts:
        raise ValueError(f"responses: expected rows of {', '.join(models)}, found none")
    for key in ((p, m) for p in prompts for m in models):
        if key not in by_key:
            raise ValueError(f"responses: expected a row for {key}, found none")
    columns = {m: [by_key[p, m] for p in prompts] for m in models}
    scores = {m: [row["score"] for row in column] for m, column in columns.items()}
    return {
        "n_prompts": len(prompts),
        "confidence": confidence,
        "models": {m: _describe(column, scores[m], confidence, seed) for m, column in columns.items()},
        "gains": {m: paired_gain(scores[models[0]], scores[m], confidence, seed) for m in models[1:]},
        "length_groups": _length_groups(columns, models, confidence, seed),
    }


def _length_groups(
    columns: dict[str, list[dict[str, Any]]], models: Sequence[str], confidence: float, seed: int
) -> list[dict[str, Any]]:
    """Gains in three groups of prompts, short to long, about equally many in each; lengths in tokens."""
    lengths = np.array([row["prompt_length"] for row in columns[models[0]]])
    cuts = np.unique(np.quantile(lengths, [1 / 3, 2 / 3], method="inverted_cdf"))
    place = np.searchsorted(cuts, lengths)
    groups = []
    for at in (np.flatnonzero(place == i) for i in np.unique(place)):
        scores = {m: [columns[m][i]["score"] for i in at] for m in models}
        groups.append(
            {
                "from": int(lengths[at].min()),
                "to": int(lengths[at].max()),
                "n": len(at),
                "gains": {m: paired_gain(scores[models[0]], scores[m], confidence, seed) for m in models[1:]},
            }
        )
    return groups


def _describe(rows: list[dict[str, Any]], scores: list[float], confidence: float, seed: int) -> dict[str, Any]:
    mean, interval = mean_interval(scores, confidence, seed)
    texts, lengths = [row["response"] for row in rows], [row["response_length"] for row in rows]
    record = {
        "mean_reward": mean,
        "interval": interval,
        "response_length": float(np.mean(lengths)),
        "eos_rate": float(np.mean([row["eos"] for row in rows])),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repetition": float(np.mean([repetition(text) for text in texts])),
        "length_correlation": rank_correlation(lengths, scores),
    }
    if "kl" in rows[0]:
        kl = [row["kl"] for row in rows]
        record |= {"kl": float(np.mean(kl)), "kl_per_token": float(np.sum(kl) / np.sum(lengths))}
    return record


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float | None:
    """Spearman's rank correlation of two float [N]; None where one of them does not vary."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)
