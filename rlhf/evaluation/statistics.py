"""Before, after and gain, with intervals; paired over prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap

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
        "win_rate": (wins + ties / 2) / len(x),
        "wins": wins,
        "ties": ties,
        "losses": losses,
    }


def summarise(rows: Sequence[dict[str, Any]], models: Sequence[str], confidence: float, seed: int) -> dict[str, Any]:
    """evaluation.json from response rows; gains are those of each model over the first.

    rows: one for each (prompt_id, model), with score (reward units), response_length (tokens) and eos (bool).
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
    }


def _describe(rows: list[dict[str, Any]], scores: list[float], confidence: float, seed: int) -> dict[str, Any]:
    mean, interval = mean_interval(scores, confidence, seed)
    return {
        "mean_reward": mean,
        "interval": interval,
        "response_length": float(np.mean([row["response_length"] for row in rows])),
        "eos_rate": float(np.mean([row["eos"] for row in rows])),
    }
