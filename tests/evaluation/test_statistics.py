"""Intervals and gains: numbers worked by hand, and a bootstrap and a normal approximation as second opinions."""

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from rlhf.evaluation.statistics import detectable_gain, mean_interval, paired_gain, paired_p_value, prompts_needed
from rlhf.evaluation.summary import summarise
from rlhf.evaluation.validity import validity
from rlhf.reward.metrics import rank_correlation


def row(prompt_id: str, model: str, score: float, length: int = 10, eos: bool = True, **more: Any) -> dict[str, Any]:
    fields = {"prompt_id": prompt_id, "model": model, "score": score, "response_length": length, "eos": eos}
    return fields | {"response": "Well well", "prompt_length": 5} | more


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
    # Resamples of {0, 1}: mean 0, 0.5, 1 with 1/4, 1/2, 1/4. For 20 % Student's t of one degree of freedom is 0.325,
    # sqrt(2) of it 0.459: the middle 35 %, all 0.5. For 95 % it is 18: all of them.
    assert mean_interval([0.0, 1.0], 0.20, seed=0) == (0.5, [0.5, 0.5])
    assert mean_interval([0.0, 1.0], 0.95, seed=0) == (0.5, [0.0, 1.0])


def test_percentiles_of_few_values_are_further_out() -> None:
    """Of ten: sqrt(10 / 9) x 2.2622 = 2.3845 deviations, beyond which the normal distribution has 0.855 % on a side."""
    values = np.random.default_rng(3).exponential(size=10)
    means = np.random.default_rng(4).choice(values, (200_000, 10)).mean(1)
    _, interval = mean_interval(values, 0.95, seed=1)
    assert interval == pytest.approx(np.percentile(means, [0.855, 99.145]), abs=0.02)


def test_intervals_of_ten_values_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    found = [mean_interval(rng.normal(0.3, 1, 10), 0.95, seed)[1] for seed in range(400)]
    assert 0.93 <= np.mean([low <= 0.3 <= high for low, high in found]) <= 0.98  # plain percentiles: 0.91


def test_the_prompts_needed_show_the_gain_in_four_of_five_studies() -> None:
    rng = np.random.default_rng(6)
    [needed] = {prompts_needed([-1.0, 1.0] * 5000, 0.95, 0.4)}
    shown = [mean_interval(rng.normal(0.4, 1, needed), 0.95, seed)[1][0] > 0 for seed in range(300)]
    assert needed == 50
    assert 0.74 <= np.mean(shown) <= 0.86


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
        "p_value": 0.75,  # of the 16 sums of +-1 +-0 +-1 +-2, 6 are 2 or more and 6 are -2 or less
        "win_rate": 2.5 / 4,
        "wins": 2,
        "ties": 1,
        "losses": 1,
        # Their standard deviation is sqrt(5 / 3) = 1.29099: (1.959964 + 0.841621) * 1.29099 / sqrt(4) = 1.80841
        "detectable": pytest.approx(1.80841, abs=1e-5),
        "prompts_needed": 53,  # 4 * (1.80841 / 0.5)^2 = 52.3
    }
    assert -1 <= low < 0.5 < high <= 2


def test_power_agrees_with_a_simulation() -> None:
    # With so many prompts, a z test on a normal difference rejects at 5 % in 80 % of experiments.
    needed = prompts_needed(np.array([-1.0, 1.0] * 50) * math.sqrt(99 / 100), 0.95, 0.4)
    assert needed == 50  # ((1.959964 + 0.841621) / 0.4)^2 = 49.06, rounded up
    draws = np.random.default_rng(0).normal(0.4, 1.0, (20_000, needed)).mean(1) * math.sqrt(needed)
    assert (np.abs(draws) > 1.959964).mean() == pytest.approx(0.8, abs=0.015)


def test_power_needs_two_prompts_and_a_gain() -> None:
    assert prompts_needed([1.0], 0.95, 0.5) is None
    assert prompts_needed([1.0, -1.0], 0.95, 0.0) is None
    assert detectable_gain([1.0], 0.95) is None
    assert prompts_needed([0.5, 0.5], 0.95, 0.5) == 0  # no noise at all


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


def test_p_value_of_many_pairs_agrees_with_the_t_test() -> None:
    x = np.random.default_rng(4).normal(0.2, 1.0, 120)
    assert paired_p_value(x, seed=0) == pytest.approx(ttest_1samp(x, 0).pvalue, abs=0.01)
    assert paired_p_value(x, seed=0) == paired_p_value(x, seed=0)


def test_p_value_at_its_ends() -> None:
    assert paired_p_value([0.0, 0.0], seed=0) == 1
    assert paired_p_value([3.0], seed=0) == 1  # both flips are as far out
    assert paired_p_value([1.0] * 10, seed=0) == pytest.approx(2 / 1024)  # two of 2^10 flips are as far out
    with pytest.raises(ValueError, match="at least one, all finite"):
        paired_p_value([], seed=0)


def test_rank_correlation_by_hand() -> None:
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15) = 0.6.
    assert rank_correlation([1, 5, 6, 90], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([1, 2, 3], [1, 1, 1]) is None


def test_gains_by_length_of_the_prompt() -> None:
    lengths, gains = [3, 3, 8, 9, 40, 50], [1, 1, 0, 0, -1, -3]
    rows = [row(str(i), "base", 0.0, prompt_length=n) for i, n in enumerate(lengths)]
    rows += [
        row(str(i), "full", float(g), prompt_length=n) for i, (n, g) in enumerate(zip(lengths, gains, strict=True))
    ]
    groups = summarise(rows, ["base", "full"], 0.95, 0)["length_groups"]
    assert [(g["from"], g["to"], g["n"], g["gains"]["full"]["gain"]) for g in groups] == [
        (3, 3, 2, 1.0),
        (8, 9, 2, 0.0),
        (40, 50, 2, -2.0),
    ]


def test_prompts_of_one_length_are_one_group() -> None:
    rows = [row(str(i), model, 0.0) for model in ("base", "full") for i in range(5)]
    assert [g["n"] for g in summarise(rows, ["base", "full"], 0.95, 0)["length_groups"]] == [5]


def test_summary() -> None:
    rows = [
        row("b", "full", 4.0, length=20, kl=4.0),
        row("a", "base", 1.0, length=5),
        row("a", "full", 2.0, length=10, kl=2.0),
        row("b", "base", 3.0, length=8, eos=False),
        row("c", "other", 9.0),
    ]
    result = summarise(rows, ["base", "full"], 0.95, seed=0)
    assert json.loads(json.dumps(result)) == result
    assert (result["n_prompts"], result["confidence"]) == (2, 0.95)
    assert result["models"] == {
        "base": {
            "mean_reward": 2.0,
            "interval": [1.0, 3.0],
            "response_length": 6.5,
            "eos_rate": 0.5,
            "distinct_1": 1 / 4,  # "well" of four words
            "distinct_2": 1 / 2,
            "repetition": 0.0,
            "length_correlation": pytest.approx(1.0),
        },
        "full": {
            "mean_reward": 3.0,
            "interval": [2.0, 4.0],
            "response_length": 15.0,
            "eos_rate": 1.0,
            "distinct_1": 1 / 4,
            "distinct_2": 1 / 2,
            "repetition": 0.0,
            "length_correlation": pytest.approx(1.0),
            "kl": 3.0,  # 2 and 4 nats on 30 tokens
            "kl_per_token": 0.2,
        },
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
        ([row("a", "base", math.inf)], r"finite score for \('a', 'base'\), found inf"),
        ([row("a", "other", 1.0)], "rows of base, full, found none"),
    ],
)
def test_wrong_rows_are_named(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarise(rows, ["base", "full"], 0.95, seed=0)


def test_a_group_of_one_prompt_has_a_gain_and_no_p_value() -> None:
    rows = [row("a", "base", 0.0), row("a", "full", 2.0)]
    gain = summarise(rows, ["base", "full"], 0.95, 0)["gains"]["full"]
    assert (gain["gain"], gain["interval"], gain["p_value"]) == (2.0, [2.0, 2.0], 1.0)


@pytest.mark.parametrize("kind", ["all equal", "ties", "all different"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_any_number_of_prompts_has_an_answer(n: int, kind: str) -> None:
    """Every figure of evaluation.json is a finite number, or None where there is none."""
    rows = []
    for i in range(n):
        for model in ("base", "full"):
            score = {"all equal": 1.0, "ties": float(i % 2), "all different": i**2 + (model == "full") * (i + 1.5)}[
                kind
            ]
            length = 5 if kind == "all equal" else i + 1
            row = {"prompt_id": str(i), "model": model, "prompt": "x", "response": "a b", "score": score, "kl": 0.1 * i}
            row |= {"gold_score": -score, "prompt_length": length, "response_length": length, "eos": i % 2 == 0}
            rows.append(row)
    found = summarise(rows, ["base", "full"], 0.95, 0)
    json.dumps(found, allow_nan=False)
    assert found["n_prompts"] == sum(group["n"] for group in found["length_groups"]) == n
    if n == 1:
        assert found["gains"]["full"]["p_value"] == 1.0
        assert found["gains"]["full"]["interval"] == [found["gains"]["full"]["gain"]] * 2


def test_kl_per_token_is_of_all_tokens_not_a_mean_of_means() -> None:
    rows = [
        {
            "prompt_id": str(i),
            "model": m,
            "prompt": "p",
            "response": "a b",
            "score": float(i),
            "prompt_length": 1,
            "response_length": n,
            "eos": True,
            "kl": kl,
        }
        for m in ("base", "full")
        for i, (n, kl) in enumerate([(1, 2.0), (9, 3.0)])
    ]
    full = summarise(rows, ["base", "full"], 0.95, 0)["models"]["full"]
    assert (full["kl"], full["kl_per_token"]) == (2.5, 0.5)


def test_the_effect_of_ending_is_that_of_all_models() -> None:
    scores = {"base": (3.0, 3.0, 1.0, 1.0), "full": (8.0, 8.0, 4.0, 4.0)}  # two ended ones, and two that were cut
    rows = [row(str(i), m, score, eos=i < 2) for m, found in scores.items() for i, score in enumerate(found)]
    ending = summarise(rows, ["base", "full"], 0.95, 0)["ending"]
    assert (ending["ended"], ending["truncated"], ending["difference"]) == (4, 4, 3.0)  # of 2 and 4


def test_every_tuned_model_is_held_against_the_first() -> None:
    """Three models whose scores, lengths, texts, KL and second scores are no two alike; seeds and confidence, too."""
    given = {
        "base": [(0.0, 5, "a b", 1.0), (2.0, 7, "c", 4.0), (4.0, 8, "d", 4.0)],
        "full": [(1.0, 6, "A b a b a b", 3.0), (3.0, 6, "e", 5.0), (7.0, 9, "e ", 9.0)],
        "lora": [(5.0, 9, "f", 2.0), (6.0, 9, " ", 2.5), (9.0, 9, "g", 6.0)],
    }
    rows = [
        row(str(i), model, score, length, response=text, gold_score=gold)
        for model, found in given.items()
        for i, (score, length, text, gold) in enumerate(found)
    ]
    result = summarise(rows, list(given), 0.8, seed=7)
    for model, gold in (("base", 3.0), ("full", 17 / 3), ("lora", 3.5)):
        assert result["models"][model]["mean_gold"] == pytest.approx(gold)
    assert result["models"]["full"]["repetition"] == pytest.approx(1 / 9)  # abab baba abab, and two of one word
    assert result["models"]["base"]["interval"] == mean_interval([0.0, 2.0, 4.0], 0.8, 7)[1]
    assert result["models"]["full"]["length_correlation"] == rank_correlation([6, 6, 9], [1.0, 3.0, 7.0]) != 1
    base = [r for r in rows if r["model"] == "base"]
    for model in ("full", "lora"):
        tuned = [r for r in rows if r["model"] == model]
        scores = [[r["score"] for r in part] for part in (base, tuned)]
        assert result["gains"][model] == paired_gain(*scores, 0.8, 7)
        assert result["validity"][model] == validity(base, tuned, 0.8, 7)
        assert result["length_groups"][0]["gains"][model] == paired_gain(*scores, 0.8, 7)
    assert result["validity"]["lora"]["empty"] == pytest.approx(1 / 3)
    assert result["validity"]["full"]["same_response"] == pytest.approx(2 / 3)
