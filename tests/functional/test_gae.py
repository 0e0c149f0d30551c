"""Advantages against numbers worked by hand and an independent sum."""

import torch
from torch import tensor
from torch.testing import assert_close

from rlhf.functional.gae import gae, moments, rescale, standardise, widest


def test_gae_by_hand():
    # gamma = lam = 0.5, V = [1, 2], r = [0, 4]: d1 = 4 - 2 = 2; d0 = 0 + 0.5*2 - 1 = 0; A0 = 0 + 0.25*2 = 0.5
    mask = tensor([[True, True, False]])
    advantages, returns = gae(tensor([[0.0, 4.0, 9.0]]), tensor([[1.0, 2.0, float("nan")]]), mask, 0.5, 0.5)
    assert_close(advantages, tensor([[0.5, 2.0, 0.0]]))
    assert_close(returns, tensor([[1.5, 4.0, 0.0]]))


def test_gae_is_the_discounted_sum_of_td_errors():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    lengths = tensor([1, 3, 7, 4, 6])
    mask = torch.arange(7) < lengths[:, None]
    gamma, lam = 0.9, 0.8
    advantages, _ = gae(rewards, values, mask, gamma, lam)
    for b, n in enumerate(lengths.tolist()):
        deltas = [rewards[b, t] + gamma * (values[b, t + 1] if t + 1 < n else 0.0) - values[b, t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n))
            assert_close(advantages[b, t], expected)
        assert (advantages[b, n:] == 0).all()


def test_lambda_1_is_monte_carlo_and_lambda_0_is_td():
    rewards, values = tensor([[1.0, 2.0, 4.0]]), tensor([[0.5, 0.25, 0.125]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    assert_close(returns, tensor([[7.0, 6.0, 4.0]]))  # what was earned from there on
    advantages, _ = gae(rewards, values, mask, 1.0, 0.0)
    assert_close(advantages, tensor([[1 + 0.25 - 0.5, 2 + 0.125 - 0.25, 4 - 0.125]]))


def test_a_cut_response_goes_on_with_the_value_after_it():
    # As in test_gae_by_hand, with 8 after the last token: d1 = 4 + 0.5*8 - 2 = 6, A0 = 0 + 0.25*6 = 1.5
    mask = tensor([[True, True, False]])
    advantages, returns = gae(tensor([[0.0, 4.0, 9.0]]), tensor([[1.0, 2.0, 9.0]]), mask, 0.5, 0.5, tensor([8.0]))
    assert_close(advantages, tensor([[1.5, 6.0, 0.0]]))
    assert_close(returns, tensor([[2.5, 8.0, 0.0]]))


def test_a_cut_response_that_fills_the_width_goes_on_too():
    # The first row as above; the second has one token: d0 = 1 + 0.5*6 - 3 = 1; the third ended: its value after is 0.
    mask = tensor([[True, True], [True, False], [True, True]])
    rewards, values = tensor([[0.0, 4.0], [1.0, 9.0], [0.0, 4.0]]), tensor([[1.0, 2.0], [3.0, 9.0], [1.0, 2.0]])
    advantages, _ = gae(rewards, values, mask, 0.5, 0.5, tensor([8.0, 6.0, 0.0]))
    assert_close(advantages, tensor([[1.5, 6.0], [1.0, 0.0], [0.5, 2.0]]))


def test_moments_of_shards_are_those_of_the_whole():
    x = tensor([1.0, 2.0, 3.0, 6.0])
    m = moments(tensor(12.0), tensor(50.0), tensor(4.0))  # sums over shards, added up
    assert_close(m.mean, x.mean())
    assert_close(m.std, x.std(correction=0))


def test_standardise_and_rescale_by_hand():
    x, mask = tensor([[1.0, 3.0, 99.0]]), tensor([[True, True, False]])
    m = moments(tensor(4.0), tensor(10.0), tensor(2.0))  # mean 2, std 1
    assert_close(standardise(x, mask, m), tensor([[-1.0, 1.0, 0.0]]))
    assert_close(rescale(x, mask, m), tensor([[1.0, 3.0, 0.0]]))


def test_a_device_without_float64_has_float32(monkeypatch):
    def zeros(*_, **options):
        assert options == {"dtype": torch.float64, "device": torch.device("mps")}
        raise TypeError("no float64 here")

    monkeypatch.setattr(torch, "zeros", zeros)
    assert widest.__wrapped__(torch.device("mps")) == torch.float32


def test_an_empty_set_has_mean_0_and_what_rounding_takes_below_0_is_no_spread():
    zero = tensor(0.0)
    assert [x.item() for x in moments(zero, zero, zero)] == [0.0, 0.0]
    assert [x.item() for x in moments(tensor(6.0), tensor(11.999), tensor(3.0))] == [2.0, 0.0]
    assert [x.item() for x in moments(tensor(3.0), tensor(9.0), tensor(1.0))] == [3.0, 0.0]
