"""Attention by products is PyTorch's attention, and plays where it is meant to and nowhere else."""

import json

import pytest
import tiny
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from rlhf.models.kernels import attention
from rlhf.models.kernels.attention import causal_products, use_cpu_attention


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


def model_of(kind):
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    grouped = {} if kind in ("gpt2", "gpt_neox") else {"num_key_value_heads": 2}
    ids = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    # Larger than by default, so that attention is far from even; no dropout.
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **size, **grouped, **ids, initializer_range=0.2)
    ).eval()


@pytest.mark.parametrize("kind", sorted(attention._KINDS))
def test_in_bf16_a_model_computes_by_products_what_it_computed_before(kind, calls):
    model, ids = model_of(kind), torch.arange(3, 43).reshape(2, 20)
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(ids).logits.float()
        use_cpu_attention(model)
        after = model(ids).logits.float()
    assert calls == [torch.bfloat16] * model.config.num_hidden_layers
    # As near to the logits of float32 as PyTorch's own kernel.
    assert (after - exact).abs().mean() < 1.5 * (before - exact).abs().mean()
    assert torch.equal(model(ids).logits, exact)


def test_a_kind_that_it_was_not_tried_with_is_left_alone():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("falcon", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    )
    use_cpu_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_everything_else_is_left_to_pytorch(calls, monkeypatch):
    model, ids = tiny.gpt2().eval(), torch.arange(3, 43).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole, padded = model(ids).logits, model(ids, attention_mask=mask).logits
    use_cpu_attention(model)
    assert torch.equal(model(ids).logits, whole)  # float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids, attention_mask=mask)  # a mask
        cache = model(ids[:, :1], use_cache=True).past_key_values  # one token
        model(ids[:, 1:2], past_key_values=cache)
        monkeypatch.setattr(attention, "_LONGEST", 19)
        model(ids)  # too long
    assert calls == []
    assert torch.equal(model(ids, attention_mask=mask).logits, padded)


@pytest.mark.parametrize("option", [{"position_bias": torch.zeros(1, 4, 7, 7)}, {"s_aux": torch.zeros(4)}, {"new": 1}])
def test_an_option_that_may_change_the_values_is_pytorchs(option, calls, monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "_SDPA", lambda *args, **options: asked.append(options))
    query, key, value = (states(4, seed, torch.bfloat16) for seed in range(3))
    run = AttentionInterface()[attention._NAME]
    run(torch.nn.Module(), query, key, value, None, **option)
    assert calls == []
    assert asked[0].keys() >= option.keys()
    run(torch.nn.Module(), query, key, value, None, position_ids=torch.arange(7), sliding_window=9, use_cache=False)
    assert len(calls) == len(asked) == 1


@pytest.mark.parametrize(("scaling", "scale"), [(0.3, 0.3), (None, 8**-0.5)])
def test_products_have_the_scale_that_the_layer_asks_for(scaling, scale):
    query, key, value = (states(4, seed, torch.bfloat16) for seed in range(3))
    found, _ = AttentionInterface()[attention._NAME](torch.nn.Module(), query, key, value, None, scaling=scaling)
    expected = causal_products(query.float(), key.float(), value.float(), scale).transpose(1, 2)
    assert_close(found.float(), expected, atol=2e-2, rtol=0)


def test_dropout_and_what_is_not_causal_are_pytorchs(calls, monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "_SDPA", lambda *args, **options: asked.append(options))
    query, key, value = (states(4, seed, torch.bfloat16) for seed in range(3))
    run, layer = AttentionInterface()[attention._NAME], torch.nn.Module()
    layer.is_causal = False
    run(layer, query, key, value, None)
    run(torch.nn.Module(), query, key, value, None, is_causal=False)
    run(torch.nn.Module(), query, key, value, None, dropout=0.5, scaling=0.3)
    assert calls == []
    assert [options["is_causal"] for options in asked] == [None, False, None]
    assert [(options["dropout"], options["scaling"]) for options in asked] == [(0.0, None), (0.0, None), (0.5, 0.3)]
    run(layer, query, key, value, None, is_causal=True)
    assert len(calls) == 1


def test_a_cap_on_scores_is_refused_as_before():
    states_of = [states(4, seed, torch.bfloat16) for seed in range(3)]
    with pytest.raises(ValueError, match="softcap"):
        AttentionInterface()[attention._NAME](torch.nn.Module(), *states_of, None, softcap=5.0)


def test_a_model_that_was_given_another_attention_keeps_it():
    model = tiny.llama()
    model.set_attn_implementation("eager")
    use_cpu_attention(model)
    assert model.config._attn_implementation == "eager"


def test_what_is_saved_does_not_name_it(tmp_path):
    model = tiny.llama()
    use_cpu_attention(model)
    model.save_pretrained(tmp_path)
    assert attention._NAME not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_one_token_attends_by_groups_as_with_keys_repeated(masked, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(3, 6, 1, 8, generator=generator).to(dtype)
    key, value = (torch.randn(3, 2, 7, 8, generator=generator).to(dtype) for _ in range(2))
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    mask[0, ..., :3] = mask[2, ..., :1] = False
    given = mask if masked else None
    repeated = (x.float().repeat_interleave(3, 1) for x in (key, value))
    expected = scaled_dot_product_attention(query.float(), *repeated, attn_mask=given, scale=0.3).transpose(1, 2)
    monkeypatch.setattr(attention, "_SDPA", None)  # transformers' own repeats them
    found, _ = AttentionInterface()[attention._NAME](torch.nn.Module(), query, key, value, given, scaling=0.3)
    assert found.dtype == dtype
    assert_close(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_a_mask_for_each_head_is_transformers_own(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "_SDPA", lambda *args, **options: asked.append(args))
    query, key = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 5, 8)
    AttentionInterface()[attention._NAME](torch.nn.Module(), query, key, key, torch.zeros(1, 4, 1, 5))
    AttentionInterface()[attention._NAME](torch.nn.Module(), query, key[:, :1].expand(1, 4, 5, 8), key, None)
    assert len(asked) == 2  # as many heads of keys as of queries are no groups
