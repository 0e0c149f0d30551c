"""Is a gain real: the second judge, length, degenerate responses; by hand and against an independent fit."""

import math

import numpy as np
import pytest
from scipy.stats import t as student

from rlhf.evaluation.validity import ending_effect, most_common_share, validity, without_length


def rows(scores, lengths=None, gold=None, responses=None):
    lengths = lengths or [10] * len(scores)
    responses = responses or [f"answer {i}" for i in range(len(scores))]
    made = [
        {"score": s, "response_length": n, "response": text}
        for s, n, text in zip(scores, lengths, responses, strict=True)
    ]
    return [r | {"gold_score": g} for r, g in zip(made, gold, strict=True)] if gold else made


def test_second_judge_by_hand():
    base = rows([0.0, 1.0, 2.0], gold=[10.0, 20.0, 30.0])
    tuned = rows([1.0, 3.0, 5.0], gold=[24.0, 26.0, 28.0])
    found = validity(base, tuned, 0.95, seed=0)
    assert (found["gold"]["before"], found["gold"]["after"], found["gold"]["gain"]) == (20.0, 26.0, 6.0)
    assert (found["gold"]["wins"], found["gold"]["losses"]) == (2, 1)
    assert found["gold"]["in_sd"] == pytest.approx(0.6)  # standard deviation of 10, 20, 30 is 10, that of the others 2
    assert found["proxy_in_sd"] == pytest.approx(2.0)  # mean gain 2, standard deviation of 0, 1, 2 is 1
    assert found["agreement"] == pytest.approx(-1)  # the proxy gains 1, 2, 3 where the gold model gains 14, 6, -2


def test_without_a_second_judge_there_is_no_gold():
    found = validity(rows([0.0, 1.0]), rows([1.0, 2.0]), 0.95, seed=0)
    assert "gold" not in found
    assert found["length"] is None  # two prompts of one length


def test_gain_at_equal_length_agrees_with_the_normal_equations():
    generator = np.random.default_rng(3)
    length = generator.integers(-20, 30, 40).astype(float)
    score = 0.4 + 0.05 * length + generator.normal(0, 0.5, 40)
    found = without_length(score, length, 0.9)
    design = np.stack([np.ones(40), length], 1)
    inverse = np.linalg.inv(design.T @ design)
    weights = inverse @ design.T @ score
    variance = ((score - design @ weights) ** 2).sum() / 38
    half, half_slope = student.ppf(0.95, 38) * np.sqrt(variance * np.diag(inverse))
    assert found["gain"] == pytest.approx(weights[0])
    assert found["slope"] == pytest.approx(weights[1])
    assert found["interval"] == pytest.approx([weights[0] - half, weights[0] + half])
    assert found["slope_interval"] == pytest.approx([weights[1] - half_slope, weights[1] + half_slope])
    assert found["mean_difference"] == pytest.approx(length.mean())


def test_a_gain_that_is_all_length_leaves_nothing():
    found = without_length([1.0, 2.0, 3.0, 4.0], [10, 20, 30, 40], 0.95)
    assert found["gain"] == pytest.approx(0, abs=1e-9)
    assert found["slope"] == pytest.approx(0.1)


def test_what_has_no_spread_or_too_few_prompts_has_no_answer():
    assert without_length([1.0, 2.0], [10, 20], 0.95) is None  # no degree of freedom is left
    assert without_length([1.0, 2.0, 3.0], [10, 20, 20], 0.95) is not None
    assert validity(rows([1.0], gold=[1.0]), rows([2.0], gold=[3.0]), 0.95, seed=0)["proxy_in_sd"] is None
    equal = validity(rows([1.0, 1.0], gold=[1.0, 2.0]), rows([2.0, 3.0], gold=[3.0, 4.0]), 0.95, seed=0)
    assert (equal["proxy_in_sd"], equal["agreement"]) == (None, None)
    assert equal["gold"]["in_sd"] == pytest.approx(2 / 0.5**0.5)
    half = rows([0.0, 1.0], gold=[1.0, 2.0])[:1] + rows([0.0, 1.0])[1:]
    assert "gold" not in validity(half, rows([1.0, 2.0], gold=[3.0, 4.0]), 0.95, seed=0)
    assert "gold" not in validity(rows([1.0, 2.0], gold=[3.0, 4.0]), half, 0.95, seed=0)


def test_degenerate_shares_by_hand():
    assert most_common_share(["yes", "yes ", "no", "maybe"]) == 0.5
    base, tuned = rows([0.0] * 4), rows([0.0] * 4, responses=["", " ", "ok", "ok then"])
    found = validity(base, tuned, 0.95, seed=0)
    assert (found["empty"], found["same_response"]) == (0.5, 0.5)


def test_the_effect_of_ending_agrees_with_the_normal_equations():
    """Score on `eos` with a mean for each model: a model without both kinds has no say."""
    generator = np.random.default_rng(5)
    models = []
    for level, share in ((0.0, 0.1), (3.0, 0.8), (9.0, 1.0)):
        ends = np.arange(20) < 20 * share
        scores = level + 2.0 * ends + generator.normal(0, 1, 20)
        models.append([{"score": float(s), "eos": bool(e)} for s, e in zip(scores, ends, strict=True)])
    found = ending_effect(models, 0.9)
    both = [row for rows in models[:2] for row in rows]
    design = np.array([[row["eos"], i < 20, i >= 20] for i, row in enumerate(both)], float)
    inverse = np.linalg.inv(design.T @ design)
    score = np.array([row["score"] for row in both])
    weights = inverse @ design.T @ score
    variance = ((score - design @ weights) ** 2).sum() / 37
    half = student.ppf(0.95, 37) * math.sqrt(variance * inverse[0, 0])
    assert found["difference"] == pytest.approx(weights[0])
    assert found["interval"] == pytest.approx([weights[0] - half, weights[0] + half])
    assert (found["ended"], found["truncated"]) == (18, 22)


def test_no_effect_of_ending_without_both_kinds():
    assert ending_effect([[{"score": 1.0, "eos": True}] * 5, [{"score": 0.0, "eos": False}] * 5], 0.95) is None
    assert ending_effect([[{"score": 1.0, "eos": True}, {"score": 0.0, "eos": False}]], 0.95) is None


def test_one_degree_of_freedom_is_enough_for_the_effect_of_ending():
    rows = [{"score": 1.0, "eos": True}, {"score": 3.0, "eos": True}, {"score": 0.5, "eos": False}]
    found = ending_effect([rows], 0.95)
    assert (found["ended"], found["truncated"], found["difference"]) == (2, 1, 1.5)
