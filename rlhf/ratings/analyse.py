"""What the ratings say: means, preferences, agreement, and how far they carry.

The unit is the prompt: raters' values of a prompt are averaged first, and prompts are resampled, since ten ratings of
one response are not ten responses.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rlhf.evaluation.statistics import mean_interval, paired_p_value, prompts_needed
from rlhf.file_types import Consistency, MeanRating, RatingComparison, RatingKey, RatingNote, Ratings, Sheet
from rlhf.ratings.agreement import krippendorff_alpha, self_consistency
from rlhf.ratings.scale import CRITERIA
from rlhf.ratings.words import in_words

DETECT = 0.3  # points: the difference that the sample size is worked out for


def analyse(key: RatingKey, sheets: Sequence[Sheet], models: Sequence[str], confidence: float, seed: int) -> Ratings:
    """ratings.json: from a key and its checked sheets. Incomplete sheets are named and left out.

    models: in the order of the report; pairs are compared as later minus earlier.
    """
    complete = [sheet for sheet in sheets if sheet["complete"]]
    result: Ratings = {
        "sheet_id": key["sheet_id"],
        "confidence": confidence,
        "criteria": {name: criterion.title for name, criterion in CRITERIA.items()},
        "raters": [sheet["rater"] for sheet in complete],
        "incomplete": [sheet["rater"] for sheet in sheets if not sheet["complete"]],
        "n_prompts": len({item["prompt_id"] for item in key["items"]}),
    }
    if not complete:
        return result | {"words": ["There is no complete rating sheet yet, so the responses cannot be compared."]}
    x, again = _table(key, complete, models, repeat=False), _table(key, complete, models, repeat=True)
    overall = x.mean(3)  # [raters, prompts, models]
    result |= {
        "models": {model: _means(x[:, :, m], confidence, seed) for m, model in enumerate(models)},
        "pairs": [
            {"of": models[b], "over": models[a], **_compare(overall[:, :, a], overall[:, :, b], confidence, seed)}
            for a, b in combinations(range(len(models)), 2)
        ],
        "agreement": {
            name: krippendorff_alpha(x[:, :, :, c].reshape(len(complete), -1)) for c, name in enumerate(CRITERIA)
        },
        "consistency": _consistency(x, again, complete),
        "notes": _notes(key, sheets),
    }
    return result | {"words": in_words(result)}


def _table(key: RatingKey, sheets: Sequence[Sheet], models: Sequence[str], repeat: bool) -> NDArray[np.float64]:
    """Ratings [raters, prompts, models, criteria]; nan for prompts that are not on the sheet (again)."""
    prompts = list(dict.fromkeys(item["prompt_id"] for item in key["items"]))
    table = np.full((len(sheets), len(prompts), len(models), len(CRITERIA)), math.nan)
    for item in (item for item in key["items"] if item["repeat"] == repeat):
        p, m = prompts.index(item["prompt_id"]), models.index(item["model"])
        for r, sheet in enumerate(sheets):
            table[r, p, m] = [sheet["items"][item["item_id"]]["ratings"][name] for name in CRITERIA]
    return table


def _means(x: NDArray[np.float64], confidence: float, seed: int) -> dict[str, MeanRating]:
    """Mean and interval over all criteria, and for each criterion; x: [raters, prompts, criteria]."""
    by_prompt = x.mean(0)
    columns = {"overall": by_prompt.mean(1)} | {name: by_prompt[:, c] for c, name in enumerate(CRITERIA)}
    intervals = {name: mean_interval(values, confidence, seed) for name, values in columns.items()}
    return {name: {"mean": mean, "interval": interval} for name, (mean, interval) in intervals.items()}


def _compare(x: NDArray[np.float64], y: NDArray[np.float64], confidence: float, seed: int) -> RatingComparison:
    """Preference for y over x and their difference in points; x, y: [raters, prompts], means over criteria."""
    difference = y - x
    wins, ties, losses = (int(n) for n in ((difference > 0).sum(), (difference == 0).sum(), (difference < 0).sum()))
    share, share_interval = mean_interval((0.5 + 0.5 * np.sign(difference)).mean(0), confidence, seed)
    by_prompt = difference.mean(0)
    mean, interval = mean_interval(by_prompt, confidence, seed)
    return {
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "preference": share,
        "preference_interval": share_interval,
        "difference": mean,
        "interval": interval,
        "p_value": paired_p_value(by_prompt, seed),
        "prompts_needed": prompts_needed(by_prompt, confidence, DETECT),
    }


def _consistency(x: NDArray[np.float64], again: NDArray[np.float64], sheets: Sequence[Sheet]) -> dict[str, Consistency]:
    """Per rater, over all ratings asked for twice; {} if none were."""
    twice = ~np.isnan(again)
    if not twice.any():
        return {}
    return {sheet["rater"]: self_consistency(x[r][twice[r]], again[r][twice[r]]) for r, sheet in enumerate(sheets)}


def _notes(key: RatingKey, sheets: Sequence[Sheet]) -> list[RatingNote]:
    return [
        {"prompt_id": item["prompt_id"], "model": item["model"], "rater": sheet["rater"], "note": note}
        for item in key["items"]
        for sheet in sheets
        if (note := sheet["items"][item["item_id"]]["note"].strip())
    ]
