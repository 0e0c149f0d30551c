"""Layers by layouts compute what they compute by themselves, and are themselves again afterwards."""

import copy
import pickle

import pytest
import tiny
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from rlhf.generation.decode import generate, uniforms
from rlhf.models.kernels import onednn_linear as module
from rlhf.models.kernels.onednn_linear import OneDNNConv1D, OneDNNLinear, decoding_layouts, layout_bytes
from rlhf.models.lora import add_lora, merged_model

BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])

pytestmark = pytest.mark.skipif(not module.available(), reason="this PyTorch has no such operators for this CPU")


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    monkeypatch.setattr(module, "_FEWEST", 1)


@pytest.fixture
def made(monkeypatch):
    """Layers whose weight was laid out."""
    seen, layout = [], module._ByLayout.layout

    def noted(self, dtype):
        if dtype not in self.layouts:
            seen.append((self, dtype))
        return layout(self, dtype)

    monkeypatch.setattr(module._ByLayout, "layout", noted)
    return seen


def layer(kind):
    torch.manual_seed(0)
    made = {"linear": nn.Linear(40, 24), "no bias": nn.Linear(40, 24, bias=False), "conv1d": Conv1D(24, 40)}[kind]
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made.requires_grad_(False)


def holding(one):
    """A model that is this layer."""
    return nn.Sequential(one)


def replaced(model):
    return [x for x in model.modules() if isinstance(x, OneDNNLinear | OneDNNConv1D)]


def adapters(model):
    return [x for x in model.modules() if type(x) is LoraLinear]


def adapted(make=tiny.llama, config=LORA):
    """A model under an adapter that changes what it says."""
    torch.manual_seed(0)
    model = add_lora(make(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (7, 40), (2, 5, 40), (0, 40)])
def test_values_of_a_layer(kind, shape, made):
    one, x = holding(layer(kind)), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(one).double()(x.double())
    with decoding_layouts(one):
        found = one(x)
        assert torch.equal(one(x), found)
    assert len(made) == 1
    assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", [lambda x: x.t().contiguous().t(), lambda x: x.expand(3, 7, 40), lambda x: x[::2]])
def test_inputs_that_are_views(view):
    one, x = holding(layer("linear")), view(torch.randn(7, 40, generator=torch.Generator().manual_seed(1)))
    expected = one(x)
    with decoding_layouts(one):
        assert_close(one(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_under_autocast_as_autocast_computes(kind, made):
    one, x = holding(layer(kind)), torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    with torch.autocast(**BF16):
        expected = one(x)
        with decoding_layouts(one):
            found = one(x)
    assert [dtype for _, dtype in made] == [torch.bfloat16] * module.available(torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert_close(found, expected)


@torch.no_grad()
def test_a_cpu_without_layouts_in_bf16_computes_in_it_all_the_same(made, monkeypatch):
    """One with AVX2 alone refuses them. It has them in float32."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    module._dtypes.cache_clear()
    try:
        assert module.available()
        assert not module.available(torch.bfloat16)
        one, x = holding(layer("linear")), torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
        half = copy.deepcopy(one).bfloat16()
        with torch.autocast(**BF16):
            expected = one(x)
        with decoding_layouts(one), decoding_layouts(half):
            with torch.autocast(**BF16):
                assert torch.equal(one(x), expected)
            assert replaced(half) == []
            assert half(x.bfloat16()).dtype == torch.bfloat16
            assert made == []
            one(x)
        assert [dtype for _, dtype in made] == [torch.float32]
    finally:
        module._dtypes.cache_clear()


@torch.no_grad()
def test_each_block_lays_out_the_weights_of_its_time(made):
    one, x = holding(layer("linear").requires_grad_()), torch.ones(2, 40)
    for factor in (1, 2):
        one[0].weight.mul_(factor)
        expected = one(x)
        with decoding_layouts(one):
            assert_close(one(x), expected)
    assert len(made) == 2


def test_layers_are_themselves_afterwards_also_after_an_error():
    model = adapted()
    before = [(x, dict(vars(x))) for x in model.modules()]

    def stopped():
        with decoding_layouts(model):
            assert replaced(model)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stopped()
    after = list(model.modules())
    assert len(after) == len(before)
    for one, (other, attributes) in zip(after, before, strict=True):
        assert one is other
        assert vars(one).keys() == attributes.keys()
        assert all(vars(one)[name] is x for name, x in attributes.items())
    assert not replaced(model)


@torch.no_grad()
def test_a_copy_made_inside_computes_by_its_own_weights():
    model, ids = adapted(), torch.arange(3, 23).reshape(1, 20)
    expected = model(ids).logits
    with decoding_layouts(model):
        model(ids)
        merged = merged_model(model)
    assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    merged.lm_head.weight.zero_()
    assert not merged(ids).logits.any()
    assert replaced(merged) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_copy_is_of_the_layer_itself(kind, copied):
    one, x = layer(kind), torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    model = holding(one)
    with decoding_layouts(model):
        model(x)
        assert type(model[0]) is {"linear": OneDNNLinear, "conv1d": OneDNNConv1D}[kind]
        other = copied(model)
    assert type(other[0]) is type(one)
    assert vars(other[0]).keys() == vars(one).keys()
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_parameters_hooks_and_modes_are_those_of_the_layers(make):
    model, called = make().requires_grad_(False).eval(), []
    before, weights = dict(model.named_parameters(remove_duplicate=False)), model.state_dict()
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *_: called.append(head))
    with decoding_layouts(model):
        assert isinstance(model.get_output_embeddings(), type(head))
        assert type(model.get_output_embeddings()) is OneDNNLinear
        after = dict(model.named_parameters(remove_duplicate=False))
        assert after.keys() == before.keys()
        assert all(after[name] is parameter for name, parameter in before.items())
        assert list(model.state_dict()) == list(weights)
        model.load_state_dict({name: torch.ones_like(tensor) for name, tensor in weights.items()})
        model(torch.arange(3, 23).reshape(1, 20))
        model.train()
    assert called == [head]
    assert all(x.training for x in model.modules())
    assert all((parameter == 1).all() for parameter in before.values())


def test_what_autocast_does_not_compute_in_is_left_to_the_layer(made):
    one, x = holding(layer("linear")), torch.ones(2, 40)
    with decoding_layouts(one):
        with torch.autocast("cpu", dtype=torch.float16):
            assert one(x).dtype == torch.float16
        with pytest.raises(RuntimeError, match="dtype"):
            one(x.bfloat16())  # no autocast: two precisions, as ever
    assert made == []


def test_what_is_not_for_it(monkeypatch):
    frozen = tiny.llama().requires_grad_(False)
    for other in (tiny.llama().requires_grad_(False).half(), tiny.llama().requires_grad_(False).to("meta")):
        with decoding_layouts(other):
            assert replaced(other) == []
    frozen.lm_head.weight.ds_id = 0  # ZeRO-3 has it
    with decoding_layouts(frozen):
        assert len(replaced(frozen)) == 2 * 7
        assert type(frozen.lm_head) is nn.Linear
    monkeypatch.setattr(module, "available", lambda: False)
    with decoding_layouts(frozen):
        assert replaced(frozen) == []


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama, adapted])
def test_responses_are_the_same(make, made, monkeypatch):
    model, prompts = make().eval(), [[5, 6, 7], [8], [9, 10]]
    u = uniforms(0, 0, ["a", "b", "c"], 8)
    found = generate(model, prompts, u, [1], 1.0)
    assert made
    monkeypatch.setattr(module, "available", lambda: False)
    assert generate(model, prompts, u, [1], 1.0) == found


@torch.no_grad()
def test_while_sampling_an_adapter_is_added_in_where_that_loses_nothing():
    model, ids = adapted(), torch.arange(3, 23).reshape(1, 20)
    expected, reference = model(ids).logits, model.get_base_model()
    added = adapters(model)
    with decoding_layouts(model):
        assert added
        assert adapters(model) == []
        assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    with torch.autocast(**BF16), decoding_layouts(model):
        assert adapters(model) == added
    with model.disable_adapter(), decoding_layouts(model):
        assert adapters(model) == added
        assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-5)
    with decoding_layouts(model.train()):  # dropout
        assert adapters(model) == added


@torch.no_grad()
def test_two_active_adapters_are_not_taken_for_one():
    model, ids = adapted(), torch.arange(3, 23).reshape(1, 20)
    one = model(ids).logits
    model.add_adapter("second", LORA)
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            nn.init.normal_(parameter, std=0.1)
    model.base_model.set_adapter(["default", "second"])
    expected = model.eval()(ids).logits
    assert (expected - one).abs().max() > 1e-2
    with decoding_layouts(model):
        assert adapters(model)
        assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_under_inference_mode():
    model, ids = adapted(), torch.arange(3, 23).reshape(1, 20)  # with weights of its own that count no versions
    expected = model(ids).logits
    with decoding_layouts(model):
        assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_adapters_that_are_more_than_a_sum_are_left_alone():
    torch.manual_seed(0)
    model = adapted(config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True))
    ids = torch.arange(3, 23).reshape(1, 20)
    expected, added = model(ids).logits, adapters(model)
    with decoding_layouts(model):
        assert adapters(model) == added
        assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_bytes_of_a_layout_by_hand():
    model = adapted()
    # Two layers: q and o 32 x 32, k and v 32 x 16, three of the MLP 32 x 64; the head, tied to embeddings, 400 x 32.
    frozen = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 400 * 32
    assert layout_bytes(model, 2, frozen=True) == 2 * frozen
    assert layout_bytes(tiny.llama(), 4) == 4 * frozen
    assert layout_bytes(tiny.llama(), 4, frozen=True) == 0
