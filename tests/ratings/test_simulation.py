"""Simulated raters with known preferences, through the whole way: sheet, import, analysis. Never part of a run."""

import numpy as np
import pytest
import rating_sheets

from rlhf.ratings.analyse import analyse
from rlhf.ratings.collect import check_sheet
from rlhf.ratings.scale import CRITERIA

PROMPTS, RATERS, STUDIES = 10, 3, 100
QUALITY = {"base": 2.6, "full": 3.1, "lora": 3.4}  # what a rater would say on average, were there no ends to the scale


def rating(values):
    return np.clip(np.round(values), 1, 5)


def study(seed):
    """Three raters who differ in severity and attention, on ten prompts of different difficulty."""
    rng = np.random.default_rng(seed)
    key = rating_sheets.key(prompts=PROMPTS, repeats=2, seed=seed)
    quality = {(f"p{i}", m): QUALITY[m] + rng.normal(0, 0.6) for i in range(PROMPTS) for m in QUALITY}
    severity = (-0.3, 0.0, 0.3)

    def value(rater):
        return lambda item, criterion: int(
            rating(quality[item["prompt_id"], item["model"]] + severity[rater] + rng.normal(0, 0.7))
        )

    filled = [rating_sheets.filled(key, f"simulated {r}", value(r), number=r) for r in range(RATERS)]
    sheets = [check_sheet(key, sheet, "simulated") for sheet in filled]
    found = analyse(key, sheets, list(QUALITY), 0.95, seed=seed)
    return found["models"], {(pair["of"], pair["over"]): pair for pair in found["pairs"]}


def truth():
    """The mean ratings on very many prompts."""
    noise = np.random.default_rng(0).normal(size=(2, 1_000_000))
    return {
        model: np.mean([rating(mean + s + 0.6 * noise[0] + 0.7 * noise[1]).mean() for s in (-0.3, 0.0, 0.3)])
        for model, mean in QUALITY.items()
    }


@pytest.mark.slow
def test_the_truth_is_within_the_intervals_in_94_of_100_studies():
    true, studies = truth(), [study(seed) for seed in range(STUDIES)]
    assert len(CRITERIA) == 5
    hits = []
    for models, pairs in studies:
        hits += [low <= true[m] <= high for m in true for low, high in [models[m]["overall"]["interval"]]]
        hits += [low <= true[b] - true[a] <= high for (b, a), pair in pairs.items() for low, high in [pair["interval"]]]
    assert len(hits) == 6 * STUDIES
    assert np.mean(hits) >= 0.94, np.mean(hits)
    for name in ("full", "lora"):
        difference = np.mean([pairs[name, "base"]["difference"] for _, pairs in studies])
        assert abs(difference - (true[name] - true["base"])) < 0.06
