"""Attention by products is PyTorch's attention, and plays where it is meant to and nowhere else."""

import json

import pytest
import tiny
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from rlhf.models import attention
from rlhf.models.attention import causal_products, use_causal_products


def states(heads, seed, dtype=torch.float64, length=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, length, 8, generator=generator, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("key_heads", [6, 3, 1])
def test_values_and_gradients_are_those_of_pytorchs_attention(key_heads):
    inputs = states(6, 0), states(key_heads, 1), states(key_heads, 2)
    others = [x.detach().clone().requires_grad_() for x in inputs]
    found = causal_products(*inputs, 0.3)
    expected = scaled_dot_product_attention(*others, is_causal=True, scale=0.3, enable_gqa=True)
    assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for output in (found, expected):
        (output * weights).sum().backward()
    for one, other in zip(inputs, others, strict=True):
        assert_close(one.grad, other.grad)


def test_worked_by_hand():
    # Two tokens; the second one's scores are 0 and log 3: weights 1/4 and 3/4.
    query = torch.tensor([[[[5.0], [1.0]]]])
    key = torch.tensor([[[[0.0], [torch.log(torch.tensor(3.0))]]]])
    value = torch.tensor([[[[4.0], [8.0]]]])
    assert_close(causal_products(query, key, value, 1.0), torch.tensor([[[[4.0], [7.0]]]]))


@pytest.fixture
def calls(monkeypatch):
    made = []

    def counted(query, *rest):
        made.append(query.dtype)
        return causal_products(query, *rest)

    monkeypatch.setattr(attention, "causal_products", counted)
    return made


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_in_16_bits_a_model_computes_by_products_what_it_computed_before(make, calls):
    model, ids = make().eval(), torch.arange(3, 43).reshape(2, 20)
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(ids).logits.float()
        use_causal_products(model)
        after = model(ids).logits.float()
    assert calls == [torch.bfloat16] * model.config.num_hidden_layers
    # As near to the logits of float32 as PyTorch's own kernel.
    assert (after - exact).abs().mean() < 1.5 * (before - exact).abs().mean()


def test_everything_else_is_left_to_pytorch(calls, monkeypatch):
    model, ids = tiny.gpt2().eval(), torch.arange(3, 43).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole, padded = model(ids).logits, model(ids, attention_mask=mask).logits
    use_causal_products(model)
    assert torch.equal(model(ids).logits, whole)  # float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids, attention_mask=mask)  # a mask
        cache = model(ids[:, :1], use_cache=True).past_key_values  # one token
        model(ids[:, 1:2], past_key_values=cache)
        monkeypatch.setattr(attention, "_LONGEST", 19)
        model(ids)  # too long
    assert calls == []
    assert torch.equal(model(ids, attention_mask=mask).logits, padded)


def test_a_model_that_was_given_another_attention_keeps_it():
    model = tiny.llama()
    model.set_attn_implementation("eager")
    use_causal_products(model)
    assert model.config._attn_implementation == "eager"


def test_what_is_saved_does_not_name_it(tmp_path):
    model = tiny.llama()
    use_causal_products(model)
    model.save_pretrained(tmp_path)
    assert attention._NAME not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
