"""Values worked by hand."""

import torch
from obvious import response_mask
from torch import tensor
from torch.testing import assert_close

from rlhf.functional.batching import last_index, left_pad, position_ids, right_pad
from rlhf.functional.losses import kl_penalty

EOS = 9


def test_response_mask_ends_with_the_first_eos():
    tokens = tensor([[3, 4, 5], [3, EOS, 4], [EOS, EOS, EOS], [3, 4, EOS]])
    assert response_mask(tokens, EOS).int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]


def test_any_of_several_eos_ids_ends_a_response():
    assert response_mask(tensor([[3, 8, 9], [9, 8, 3]]), [8, 9]).int().tolist() == [[1, 1, 0], [1, 0, 0]]


def test_positions_start_at_the_first_real_token():
    mask = tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    assert position_ids(mask.bool()).tolist() == position_ids(mask).tolist()


def test_last_index_on_either_side_of_the_padding():
    mask = tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    assert last_index(mask).tolist() == [3, 1, 2, 0]


def test_padding_is_told_by_the_mask_also_where_a_token_equals_the_pad():
    rows = [[1, EOS], [2, 3, 4], []]
    ids, mask = left_pad(rows, EOS)
    assert ids.tolist() == [[EOS, 1, EOS], [2, 3, 4], [EOS] * 3]
    assert mask.int().tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 0]]
    ids, mask = right_pad(rows, EOS)
    assert ids.tolist() == [[1, EOS, EOS], [2, 3, 4], [EOS] * 3]
    assert mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]


def test_kl_estimators_by_hand():
    # p = 1/2 under the policy, 1/4 and 1 under the reference: r = 1/2 and 2.
    logp, ref = tensor([[0.5, 0.5]]).log(), tensor([[0.25, 1.0]]).log()
    assert_close(kl_penalty(logp, ref, "k1"), tensor([[0.693147, -0.693147]]))
    assert_close(kl_penalty(logp, ref, "k3"), tensor([[0.193147, 0.306853]]))


def test_both_estimators_average_to_the_kl_over_the_vocabulary():
    p, q = tensor([0.7, 0.2, 0.1]), tensor([0.3, 0.3, 0.4])
    exact = (p * (p / q).log()).sum()
    for name in ("k1", "k3"):
        assert_close((p * kl_penalty(p.log(), q.log(), name)).sum(), exact)
    assert (kl_penalty(p.log(), q.log(), "k3") >= 0).all()
    assert torch.equal(kl_penalty(p.log(), p.log(), "k3"), torch.zeros(3))
