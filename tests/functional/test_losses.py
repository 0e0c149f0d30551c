"""PPO's losses and the ranking loss against numbers worked by hand; no split changes them."""

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from rlhf.functional.losses import kl_penalty, pairwise_margin_ranking_loss, policy_loss, value_loss


def test_policy_loss_by_hand():
    # ratios 1, 1.5 (clipped at 1.2), 0.5 (clipped at 0.8); advantages 1, 1, -1
    logp = tensor([[1.0, 1.5, 0.5]]).log().requires_grad_()
    advantages, mask = tensor([[1.0, 1.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool)
    loss = policy_loss(logp, torch.zeros(1, 3), advantages, mask, 0.2, 3)
    assert_close(loss, tensor((-1.0 - 1.2 + 0.8) / 3))
    loss.backward()
    assert_close(logp.grad, tensor([[-1 / 3, 0.0, 0.0]]))  # no gradient where the clip decides


def test_value_loss_by_hand():
    # old 0, return 1: value 0.5 moves 0.5, clipped to 0.2: max(0.25, 0.64) / 2 = 0.32
    mask = tensor([[True, False]])
    loss = value_loss(tensor([[0.5, 7.0]]), tensor([[0.0, 0.0]]), tensor([[1.0, 1.0]]), mask, 0.2, 1)
    assert_close(loss, tensor(0.32))


@pytest.mark.parametrize(
    ("value", "old", "target", "expected"),
    [
        (0.5, 0.0, 0.0, 0.125),  # away from the return: clipped 0.04, unclipped 0.25
        (-0.5, 0.0, -1.0, 0.32),  # down, towards it: clipped (-0.2 + 1)^2 = 0.64, unclipped 0.25
        (-0.5, 0.0, 0.0, 0.125),  # down, away from it
        (1.1, 1.0, 3.0, 1.805),  # inside the clip both are 1.9^2
    ],
)
def test_the_larger_of_both_value_errors_counts_in_either_direction(value, old, target, expected):
    mask = tensor([[True]])
    found = value_loss(tensor([[value]]), tensor([[old]]), tensor([[target]]), mask, 0.2, 1)
    assert_close(found, tensor(expected))


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_values_and_gradients_do_not_depend_on_the_split(parts):
    g = torch.Generator().manual_seed(1)
    new, old, a = (torch.randn(8, 5, generator=g) for _ in range(3))
    mask = torch.arange(5) < torch.randint(1, 6, (8, 1), generator=g)
    n = mask.sum()
    for loss in (policy_loss, value_loss):
        whole = new.clone().requires_grad_()
        split = new.clone().requires_grad_()
        loss(whole, old, a, mask, 0.2, n).backward()
        for i in torch.arange(8).tensor_split(parts):
            loss(split[i], old[i], a[i], mask[i], 0.2, n).backward()
        assert_close(split.grad, whole.grad)


def test_margin_ranking_loss_by_hand():
    chosen, rejected = tensor([2.0, 0.5]).requires_grad_(), tensor([0.0, 0.0])
    loss = pairwise_margin_ranking_loss(chosen, rejected, 1.0)  # max(0, 1-2) = 0, max(0, 1-0.5) = 0.5
    assert_close(loss, tensor(0.25))
    loss.backward()
    assert_close(chosen.grad, tensor([0.0, -0.5]))


def test_what_lies_beside_the_mask_gets_no_gradient():
    """A ratio of e^200 there is inf in float32, and 0 times that is no number."""
    logp = tensor([[0.1, 200.0]]).requires_grad_()
    loss = policy_loss(logp, torch.zeros(1, 2), torch.ones(1, 2), tensor([[True, False]]), 0.2, 1)
    loss.backward()
    assert_close(loss, -tensor(0.1).exp())
    assert_close(logp.grad, tensor([[-math.exp(0.1), 0.0]]))


def test_another_estimator_of_kl_is_refused():
    with pytest.raises(ValueError, match=r"^kl_estimator: expected 'k1' or 'k3', found 'k2'$"):
        kl_penalty(tensor(0.0), tensor(0.0), "k2")
