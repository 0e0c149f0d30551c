"""The content of evaluation.json, computed from the response rows."""

from collections.abc import Sequence

import numpy as np

from rlhf.evaluation.statistics import mean_interval, paired_gain
from rlhf.evaluation.text import distinct, repetition
from rlhf.evaluation.validity import ending_effect, validity
from rlhf.file_types import Evaluation, LengthGroup, ModelSummary, ResponseRow
from rlhf.reward.metrics import rank_correlation


def summarise(rows: Sequence[ResponseRow], models: Sequence[str], confidence: float, seed: int) -> Evaluation:
    """The content of evaluation.json; each gain is over the first model.

    rows: one for each (prompt_id, model), with response, score (reward units), prompt_length and response_length
    (tokens), eos (bool) and, if computed, kl (nats) and gold_score (of a second reward model). Rows of other models
    are ignored. A ValueError names a (prompt_id, model) with two rows, none, or a score that is not finite.
    """
    by_key: dict[tuple[str, str], ResponseRow] = {}
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
        "validity": {m: validity(columns[models[0]], columns[m], confidence, seed) for m in models[1:]},
        "ending": ending_effect(list(columns.values()), confidence),
        "length_groups": _length_groups(columns, models, confidence, seed),
    }


def _length_groups(
    columns: dict[str, list[ResponseRow]], models: Sequence[str], confidence: float, seed: int
) -> list[LengthGroup]:
    """Gains in three groups of prompts by length (tokens), short to long, of about equal size."""
    lengths = np.array([row["prompt_length"] for row in columns[models[0]]])
    cuts = np.unique(np.quantile(lengths, [1 / 3, 2 / 3], method="inverted_cdf"))
    place = np.searchsorted(cuts, lengths)
    groups: list[LengthGroup] = []
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


def _describe(rows: list[ResponseRow], scores: list[float], confidence: float, seed: int) -> ModelSummary:
    mean, interval = mean_interval(scores, confidence, seed)
    texts, lengths = [row["response"] for row in rows], [row["response_length"] for row in rows]
    record: ModelSummary = {
        "mean_reward": mean,
        "interval": interval,
        "response_length": float(np.mean(lengths)),
        "eos_rate": float(np.mean([row["eos"] for row in rows])),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repetition": float(np.mean([repetition(text) for text in texts])),
        "length_correlation": rank_correlation(lengths, scores),
    }
    if "gold_score" in rows[0]:
        record["mean_gold"] = float(np.mean([row["gold_score"] for row in rows]))
    if "kl" in rows[0]:
        kl = [row["kl"] for row in rows]
        record["kl"], record["kl_per_token"] = float(np.mean(kl)), float(np.sum(kl) / np.sum(lengths))
    return record
