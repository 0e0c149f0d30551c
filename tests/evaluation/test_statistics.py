"""Intervals and gains: numbers worked by hand, and a bootstrap and a normal approximation as second opinions."""

import json
import math
from typing import Any

import numpy as np
import pytest

from rlhf.evaluation.statistics import mean_interval, paired_gain, summarise


def row(prompt_id: str, model: str, score: float, length: int = 10, eos: bool = True) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "model": model, "score": score, "response_length": length, "eos": eos}


def test_interval_agrees_with_a_plain_bootstrap_and_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(1.5, 2.0, 400)
    mean, (low, high) = mean_interval(values, 0.95, seed=1)
    assert mean == pytest.approx(values.mean())

    rng = np.random.default_rng(99)
    means = [rng.choice(values, len(values)).mean() for _ in range(4000)]
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.02)

    half = 1.959964 * values.std(ddof=1) / math.sqrt(len(values))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)


def test_interval_of_two_values_by_hand() -> None:
    # Resamples of {0, 1}: mean 0, 0.5, 1 with 1/4, 1/2, 1/4. The middle 40 % is all 0.5, the middle 95 % is [0, 1].
    assert mean_interval([0.0, 1.0], 0.40, seed=0) == (0.5, [0.5, 0.5])
    assert mean_interval([0.0, 1.0], 0.95, seed=0) == (0.5, [0.0, 1.0])


def test_confidence_widens_and_seed_decides() -> None:
    values = np.random.default_rng(2).normal(size=50)
    _, (low, high) = mean_interval(values, 0.8, seed=0)
    _, (lower, higher) = mean_interval(values, 0.99, seed=0)
    assert lower < low < high < higher
    assert mean_interval(values, 0.95, seed=5) == mean_interval(values, 0.95, seed=5)
    assert mean_interval(values, 0.95, seed=5) != mean_interval(values, 0.95, seed=6)


@pytest.mark.parametrize("values", [[2.5], [2.5, 2.5, 2.5]])
def test_degenerate_values_have_no_width(values: list[float]) -> None:
    assert mean_interval(values, 0.95, seed=0) == (2.5, [2.5, 2.5])


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_values_without_a_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="expected at least one, all finite"):
        mean_interval(values, 0.95, seed=0)


def test_gain_by_hand() -> None:
    # Differences 1, 0, -1, 2: two wins, a tie, a loss.
    result = paired_gain([0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 5.0], 0.95, seed=0)
    low, high = result.pop("interval")
    assert result == {
        "before": 1.5,
        "after": 2.0,
        "gain": 0.5,
        "win_rate": 2.5 / 4,
        "wins": 2,
        "ties": 1,
        "losses": 1,
    }
    assert -1 <= low < 0.5 < high <= 2


def test_gain_is_paired() -> None:
    # The prompts differ by far more than the models: only pairing sees that every prompt gained by 0.1.
    before = np.linspace(-50, 50, 30)
    result = paired_gain(before, before + np.tile([0.05, 0.15], 15), 0.95, seed=0)
    assert result["gain"] == pytest.approx(0.1)
    assert 0.05 < result["interval"][0] < result["interval"][1] < 0.15
    assert result["win_rate"] == 1


def test_gain_of_a_model_over_itself() -> None:
    result = paired_gain([1.0, 2.0], [1.0, 2.0], 0.95, seed=0)
    assert (result["gain"], result["interval"], result["win_rate"], result["ties"]) == (0, [0, 0], 0.5, 2)


def test_gain_needs_pairs() -> None:
    with pytest.raises(ValueError, match="expected equally many"):
        paired_gain([1.0, 2.0], [1.0], 0.95, seed=0)


def test_summary() -> None:
    rows = [
        row("b", "full", 4.0, length=20),
        row("a", "base", 1.0, length=5),
        row("a", "full", 2.0, length=10),
        row("b", "base", 3.0, length=8, eos=False),
        row("c", "other", 9.0),
    ]
    result = summarise(rows, ["base", "full"], 0.95, seed=0)
    assert json.loads(json.dumps(result)) == result
    assert (result["n_prompts"], result["confidence"]) == (2, 0.95)
    assert result["models"] == {
        "base": {"mean_reward": 2.0, "interval": [1.0, 3.0], "response_length": 6.5, "eos_rate": 0.5},
        "full": {"mean_reward": 3.0, "interval": [2.0, 4.0], "response_length": 15.0, "eos_rate": 1.0},
    }
    assert list(result["gains"]) == ["full"]
    gain = result["gains"]["full"]
    assert (gain["before"], gain["after"], gain["gain"], gain["interval"]) == (2.0, 3.0, 1.0, [1.0, 1.0])
    assert (gain["wins"], gain["win_rate"]) == (2, 1)


def test_order_of_rows_does_not_matter_to_the_pairs() -> None:
    scores = {"base": [0.0, 10.0, 20.0], "full": [1.0, 9.0, 22.0]}
    rows = [row(str(i), model, column[i]) for model, column in scores.items() for i in range(3)]
    mixed = [rows[i] for i in (4, 0, 5, 2, 3, 1)]
    counts = [summarise(r, ["base", "full"], 0.95, 0)["gains"]["full"] for r in (rows, mixed)]
    assert [(c["wins"], c["losses"], c["gain"]) for c in counts] == [(2, 1, pytest.approx(2 / 3))] * 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a", "base", 1.0), row("a", "base", 1.0)], r"one row for \('a', 'base'\), found two"),
        ([row("a", "base", 1.0)], r"a row for \('a', 'full'\), found none"),
        ([row("a", "base", math.nan)], r"finite score for \('a', 'base'\), found nan"),
        ([row("a", "other", 1.0)], "rows of base, full, found none"),
    ],
)
def test_wrong_rows_are_named(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarise(rows, ["base", "full"], 0.95, seed=0)
