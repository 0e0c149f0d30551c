"""Ziegler et al. 2019, eq. 4, by hand."""

import pytest

from rlhf.ppo.kl_control import AdaptiveKLController


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.05, 0.1), (0.055, 0.1 * (1 + 0.1 * 64 / 1000)), (5.0, 0.1 * (1 + 0.2 * 0.064)), (0.0, 0.1 * (1 - 0.2 * 0.064))],
)
def test_the_coefficient_follows_the_error(kl, expected):
    assert AdaptiveKLController(0.1, 0.05, 1000).update(kl, 64) == pytest.approx(expected)
