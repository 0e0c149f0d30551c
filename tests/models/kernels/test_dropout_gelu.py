"""Dropout of adapters by faster means is dropout."""

import pytest
import tiny
import torch
from peft import LoraConfig
from torch import nn
from torch.testing import assert_close

from rlhf.models.kernels.dropout_gelu import fuse_dropout
from rlhf.models.lora import add_lora


def fused(p):
    model = nn.ModuleDict({"lora_dropout": nn.Dropout(p), "other": nn.Dropout(p)})
    fuse_dropout(model)
    return model


def test_only_that_of_adapters_is_replaced():
    model = fused(0.1)
    assert type(model["lora_dropout"]) is not nn.Dropout
    assert type(model["other"]) is nn.Dropout
    adapted = add_lora(tiny.gpt2(), LoraConfig(lora_dropout=0.25, task_type="CAUSAL_LM"))
    fuse_dropout(adapted)
    found = [m for name, m in adapted.named_modules() if ".lora_dropout." in name]
    assert found
    assert all(type(m) is not nn.Dropout and m.p == 0.25 for m in found)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_share_p_is_dropped_and_the_mean_stays(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 999, requires_grad=True)  # not a multiple of the four numbers of a random word
    y = fused(p)["lora_dropout"](x)
    dropped = y == 0
    n = x.numel()
    assert abs(dropped.float().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5
    assert_close(y[~dropped], torch.full_like(y[~dropped], 1 / (1 - p)), rtol=2**-15, atol=0)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # of a kept number the scale, of a dropped one 0
    # Neighbours, which share a random word, and rows are dropped independently of each other.
    kept = (~dropped).double() - (1 - p)
    for one, other in ((kept[:, 1:], kept[:, :-1]), (kept[:, 4:], kept[:, :-4]), (kept[1:], kept[:-1])):
        correlation = (one * other).mean() / (p * (1 - p))
        assert abs(correlation.item()) < 5 / n**0.5


def test_the_seed_decides_and_evaluation_drops_nothing():
    dropout, x = fused(0.3)["lora_dropout"], torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(4)
    first = dropout(x)
    second = dropout(x)
    torch.manual_seed(4)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(second, first)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize(("p", "value"), [(0.0, 1.0), (1.0, 0.0)])
def test_none_and_all(p, value):
    assert torch.equal(fused(p)["lora_dropout"](torch.ones(3)), torch.full((3,), value))


def test_16_bits_stay_16_bits():
    assert fused(0.1)["lora_dropout"](torch.ones(4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_kept_numbers_are_scaled_by_the_inverse_of_their_own_share():
    """Of 2^16 levels 6,554 are dropped for 0.1, which is a little more."""
    kept = fused(0.1)["lora_dropout"](torch.ones(1000, dtype=torch.float64)).unique().tolist()
    assert kept == [0.0, pytest.approx(65536 / 58982, rel=1e-7)]
