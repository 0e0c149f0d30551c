"""The words on whether a gain is real follow the stated rules."""

import pytest

from rlhf.reporting.conclusions import GAIN_RULES, gain_conclusions

ROSE, FLAT, FELL = [0.2, 0.8], [-0.2, 0.4], [-0.8, -0.2]
SLOPE = {"mean_difference": 12.0, "slope": 0.05, "slope_interval": [0.02, 0.08]}
PLAIN = {"repetition": 0.02, "distinct_2": 0.9}


def evaluation(proxy=ROSE, gold=None, length=None, tuned=PLAIN, **checks):
    if gold is not None:
        checks |= {"gold": {"gain": sum(gold) / 2, "interval": gold}, "agreement": 0.25}
    checks |= {"length": length}
    return {
        "models": {"base": PLAIN, "full": tuned},
        "gains": {"full": {"gain": sum(proxy) / 2, "interval": proxy}},
        "validity": {"full": {"same_response": 0.02, "empty": 0.0, **checks}},
    }


def said(**kinds):
    return " ".join(gain_conclusions(evaluation(**kinds), "full"))


@pytest.mark.parametrize(
    ("proxy", "gold", "words"),
    [
        (ROSE, ROSE, "The proxy rose, and so did the gold model"),
        (
            ROSE,
            FLAT,
            "The proxy rose, but the gold model did not move beyond noise: PPO may have",
        ),
        (ROSE, FELL, "The proxy rose, but the gold model fell: PPO may"),
        (FLAT, ROSE, "The proxy did not move beyond noise; the gold model rose"),
        (FELL, FELL, "The proxy fell; the gold model fell"),
        (ROSE, None, "No second reward model scored"),
    ],
)
def test_proxy_against_gold(proxy, gold, words):
    assert said(proxy=proxy, gold=gold).startswith(words)


def test_figures_stand_beside_the_words():
    assert "(over-optimisation; proxy +0.500 (+0.200 to +0.800), gold +0.100 (-0.200 to +0.400)" in said(gold=FLAT)
    assert "rank correlation of 0.25" in said(gold=FLAT)


def test_length_explains_a_gain_when_nothing_is_left_and_the_slope_is_there():
    gone = SLOPE | {"gain": 0.0, "interval": [-0.1, 0.1]}
    assert "Length explains the gain: responses became longer, and at equal length it is +0.000" in said(length=gone)
    assert "became shorter" in said(length=gone | {"mean_difference": -3.0})
    assert "Length alone does not explain" in said(length=gone | {"slope_interval": [-0.01, 0.08]})
    assert "Length alone does not explain" in said(length=SLOPE | {"gain": 0.3, "interval": [0.1, 0.5]})
    assert "Length" not in said(length=gone, proxy=FLAT)  # no gain, nothing to explain


def test_degenerate_responses_are_named():
    words = said(tuned={"repetition": 0.2, "distinct_2": 0.5}, empty=0.25, same_response=0.3)
    assert "repetition went from 0.020 to 0.200" in words
    assert "distinct-2 went from 0.900 to 0.500" in words
    assert "25% are empty, 30% are identical" in words
    assert "degenerate" not in said(tuned={"repetition": 0.1, "distinct_2": 0.7}, empty=0.1)


def test_nothing_evaluated_nothing_said():
    assert gain_conclusions({}, "full") == []
    assert "70%" in GAIN_RULES
