"""Points, running means and shares, by hand."""

import math

import pytest

from rlhf.reporting import values


def test_series_leaves_out_what_is_not_a_finite_number() -> None:
    rows = [
        {"step": 1, "y": 2},
        {"step": 2},
        {"step": 3, "y": math.nan},
        {"step": 4, "y": "x"},
        {"y": 5},
        {"step": True, "y": 7},
    ]
    rows += [{"step": True, "y": 7}]
    assert values.series([*rows, {"step": 6, "y": 0.5}], "y") == ([1.0, 6.0], [2.0, 0.5])


def test_running_mean_by_hand() -> None:
    assert values.running_mean([1, 3, 8, 1], width=2) == [1, 2, 5.5, 4.5]
    assert values.running_mean([]) == []
    assert values.running_mean([11.0] + [0.0] * 10) == pytest.approx([11 / n for n in range(1, 11)] + [0])  # of ten


def test_share_inside_counts_the_ends_of_the_band() -> None:
    assert values.share_inside([0.01, 0.02, 0.05, 0.1, 0.11]) == 3 / 5
    assert values.share_inside([0.01, 0.5, 1.0], (0.5, 0.75)) == 1 / 3
    assert math.isnan(values.share_inside([]))
