"""Agreement against published and hand-worked values."""

import numpy as np
import pytest

from rlhf.ratings.agreement import krippendorff_alpha, self_consistency

_ = np.nan
# Four observers, twelve units: the example of Krippendorff 2011, section C, whose ordinal alpha is 0.815.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]


def test_the_published_example():
    assert krippendorff_alpha(PUBLISHED) == pytest.approx(0.815, abs=5e-4)


def test_two_raters_by_hand():
    # Units (1,1), (1,2), (2,2): o_11 = 2, o_12 = o_21 = 1, o_22 = 2; n = 6, n_1 = n_2 = 3. With two values the
    # distance drops out: alpha = 1 - 5 * 2 / (2 * 3 * 3) = 4/9.
    assert krippendorff_alpha([[1, 1, 2], [1, 2, 2]]) == pytest.approx(4 / 9)


def test_full_agreement_and_its_opposite():
    assert krippendorff_alpha([[1, 3, 5], [1, 3, 5]]) == 1
    assert krippendorff_alpha([[1, 5, 1, 5], [5, 1, 5, 1]]) < 0


def test_order_of_raters_and_lone_ratings_do_not_count():
    x = np.array(PUBLISHED)
    lone = np.column_stack([x, [_, _, 5, _]])
    assert krippendorff_alpha(lone[::-1]) == pytest.approx(krippendorff_alpha(x))


@pytest.mark.parametrize("ratings", [[[3, 3], [3, 3]], [[1, 2, 3]], [[1, _], [_, 2]]])
def test_no_measure_where_there_is_none(ratings):
    assert krippendorff_alpha(ratings) is None


def test_self_consistency_by_hand():
    assert self_consistency([1, 2, 3, 4], [1, 4, 3, 3]) == {"n": 4, "same": 0.5, "mean_difference": 0.75}
