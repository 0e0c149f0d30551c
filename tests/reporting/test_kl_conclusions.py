"""The words on a run's KL follow the stated rule."""

import pytest

from rlhf.reporting.conclusions import kl_conclusion


def rows(values):
    return [{"step": i, "objective/kl_per_token": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.0] * 12 + [0.01] * 4, "too low to learn much: 0.010 nats per token over the last 4 steps, 0% of all"),
        ([0.0] * 12 + [0.06] * 4, "moderate: 0.060 nats per token over the last 4 steps, 25% of all steps"),
        ([0.02] * 8, "moderate: 0.020"),  # the band's ends belong to it
        ([0.05] * 12 + [0.2] * 4, "growing too fast: 0.200"),
        ([0.3], "growing too fast: 0.300 nats per token over the last 1 steps"),
        ([0.0] * 30 + [0.04] * 10, "moderate: 0.040 nats per token over the last 10 steps"),
    ],
)
def test_the_last_quarter_decides(values, words):
    assert kl_conclusion(rows(values)).startswith(words)


def test_steps_above_the_band_are_said_though_the_end_is_inside():
    assert "; 1 of 6 steps were above the band, at most 0.500" in kl_conclusion(
        rows([0.05, 0.5, 0.05, 0.05, 0.05, 0.05])
    )


def test_the_band_is_the_one_that_is_given_and_its_ends_belong_to_it():
    band = (0.25, 0.5)
    for value, kind in ((0.25, "moderate"), (0.5, "moderate"), (0.24, "too low"), (0.51, "growing too fast")):
        assert kl_conclusion(rows([value] * 4), band).startswith(kind)
    assert kl_conclusion(rows([0.25, 0.5, 0.1, 0.5]), band).endswith("75% of all steps inside 0.25 to 0.5")
    low, high = kl_conclusion(rows([0.1] * 4), band), kl_conclusion(rows([0.6] * 4), band)
    assert low.endswith("; try a higher learning rate, more steps or a lower KL coefficient")
    assert high.endswith("; try a lower learning rate or a higher KL coefficient, and read some samples")


def test_no_value_no_words():
    assert kl_conclusion([{"step": 1}]) is None
