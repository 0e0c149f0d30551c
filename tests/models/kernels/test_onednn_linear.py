"""Layers by layouts compute what they compute by themselves, and are themselves again afterwards."""

import copy
import pickle

import pytest
import tiny
import tiny_ppo
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from rlhf.generation.decode import generate, uniforms
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.kernels import onednn_linear as module
from rlhf.models.kernels.onednn_linear import FrozenLayouts, OneDNNConv1D, OneDNNLinear, decoding_layouts, layout_bytes
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

    def noted(self, dtype, transposed=False):
        if (dtype, transposed) not in self.layouts:
            seen.append((self, dtype, transposed))
        return layout(self, dtype, transposed)

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


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (7, 40), (2, 5, 40), (0, 40)])
def test_values_and_gradients_of_a_layer(kind, shape, made):
    one, generator = holding(layer(kind)), torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).requires_grad_()
    weights = torch.randn(*shape[:-1], 24, generator=generator)
    exact = copy.deepcopy(one).double()(x.double())
    (expected,) = torch.autograd.grad((one(x) * weights).sum(), x)
    with FrozenLayouts().active(one):
        found = one(x)
        (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    assert [back for _, _, back in made] == [False, True]
    assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", [lambda x: x.t().contiguous().t(), lambda x: x.expand(3, 7, 40), lambda x: x[::2]])
def test_inputs_that_are_views(view):
    one, x = holding(layer("linear")), view(torch.randn(7, 40, generator=torch.Generator().manual_seed(1)))
    expected = one(x)
    with FrozenLayouts().active(one):
        assert_close(one(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_under_autocast_as_autocast_computes(kind):
    one, x = holding(layer(kind)), torch.randn(7, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast(**BF16):
        expected = one(x)
        (gradient,) = torch.autograd.grad(expected.float().sum(), x)
        with FrozenLayouts().active(one):
            found = one(x)
            (other,) = torch.autograd.grad(found.float().sum(), x)
    assert found.dtype == torch.bfloat16
    assert other.dtype == torch.float32
    assert_close(found, expected)
    assert_close(other, gradient, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_log_probs_values_and_gradients_of_adapters(make, precision, made):
    critic = adapted(tiny.gpt2_reward if make is tiny.gpt2 else tiny.llama_reward)
    both = ActorCritic(adapted(make), critic, 0.9)
    ids = torch.randint(5, 300, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :4], mask[1, -2:] = False, False

    def results():
        with torch.autocast(**BF16, enabled=precision == "bf16"):
            logp, entropy, values = both(ids, mask, 6)
        both.zero_grad()
        (logp.sum() + values.sum()).backward()
        return logp, entropy, values, *(p.grad.clone() for p in both.parameters() if p.requires_grad)

    expected = results()
    assert made == []
    with FrozenLayouts().active(both):
        found = results()
    # Of GPT-2's three layers in the place of c_attn, and all others, in both models; the head is the policy's.
    assert {type(x) for x, _, _ in made} == ({OneDNNLinear, OneDNNConv1D} if make is tiny.gpt2 else {OneDNNLinear})
    assert {back for _, _, back in made} == {True, False}
    close = {"rtol": 1e-5, "atol": 1e-5} if precision == "fp32" else {"rtol": 2e-2, "atol": 2e-2}
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, **close)


def test_frozen_layers_only_and_their_layouts_are_kept(made):
    model, kept, ids = adapted(), FrozenLayouts(), torch.arange(3, 23).reshape(1, 20)
    for _ in range(3):
        with kept.active(model):
            model(ids)
    layers = [x for x, _, _ in made]
    assert len(layers) == len(set(map(id, layers))) > 10
    assert not any(p.requires_grad for x in layers for p in x.parameters())
    whole, before = tiny.llama(), len(made)
    with kept.active(whole):
        whole(ids)
    assert len(made) == before  # what is trained is never laid out there


def test_a_layer_whose_bias_is_trained_is_not_frozen(made):
    one = holding(layer("linear"))
    one[0].bias.requires_grad_()
    with FrozenLayouts().active(one):
        one(torch.ones(2, 40)).sum().backward()
    assert made == []
    assert one[0].bias.grad is not None


def test_a_weight_that_was_changed_is_laid_out_anew():
    one, kept, x = holding(layer("linear")), FrozenLayouts(), torch.ones(2, 40)
    with kept.active(one):
        one(x)
    with torch.no_grad():
        one[0].weight.mul_(2)
    expected = one(x)
    with kept.active(one):
        assert_close(one(x), expected)
    one[0].weight = nn.Parameter(torch.zeros(24, 40), requires_grad=False)
    with kept.active(one):
        assert_close(one(x), one[0].bias.expand(2, 24))


def test_layers_are_themselves_afterwards_also_after_an_error():
    model = adapted()
    before = [(x, dict(vars(x))) for x in model.modules()]

    def stopped():
        with FrozenLayouts().active(model), decoding_layouts(model):
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
    with FrozenLayouts().active(model):
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
    with FrozenLayouts().active(model):
        model(x)
        assert type(model[0]) is {"linear": OneDNNLinear, "conv1d": OneDNNConv1D}[kind]
        other = copied(model)
    assert type(other[0]) is type(one)
    assert vars(other[0]).keys() == vars(one).keys()
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama, adapted])
def test_parameters_hooks_and_modes_are_those_of_the_layers(make):
    model, called = make().requires_grad_(False).eval(), []
    before, weights = dict(model.named_parameters(remove_duplicate=False)), model.state_dict()
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *_: called.append(head))
    with FrozenLayouts().active(model):
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


def test_gradient_checkpointing_computes_by_layouts_again(made):
    model, ids = adapted(), torch.arange(3, 23).reshape(1, 20)
    model.enable_input_require_grads()
    model.train()
    for x in adapters(model):
        x.lora_dropout = nn.ModuleDict({"default": nn.Identity()})

    def gradients():
        model.zero_grad()
        model(ids).logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with FrozenLayouts().active(model):
        found = gradients()
    assert made
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_autocast_does_not_compute_in_is_left_to_the_layer(made):
    one, x = holding(layer("linear")), torch.ones(2, 40)
    with FrozenLayouts().active(one):
        with torch.autocast("cpu", dtype=torch.float16):
            assert one(x).dtype == torch.float16
        with pytest.raises(RuntimeError, match="dtype"):
            one(x.bfloat16())  # no autocast: two precisions, as ever
    assert made == []


def test_what_is_not_for_it(monkeypatch):
    frozen = tiny.llama().requires_grad_(False)
    for other in (tiny.llama().requires_grad_(False).half(), tiny.llama().requires_grad_(False).to("meta")):
        with FrozenLayouts().active(other), decoding_layouts(other):
            assert replaced(other) == []
    frozen.lm_head.weight.ds_id = 0  # ZeRO-3 has it
    with FrozenLayouts().active(frozen):
        assert len(replaced(frozen)) == 2 * 7
        assert type(frozen.lm_head) is nn.Linear
    monkeypatch.setattr(module, "available", lambda: False)
    with FrozenLayouts().active(frozen), decoding_layouts(frozen):
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
    for inside in (decoding_layouts(model), FrozenLayouts().active(model)):
        with inside:
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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_run_with_adapters_comes_out_the_same(tmp_path, family, made, monkeypatch):
    tiny_ppo.trainer(tmp_path / "with", family, lora=True).train()
    assert {back for _, _, back in made} == {True, False}
    monkeypatch.setattr(module, "available", lambda: False)
    tiny_ppo.trainer(tmp_path / "without", family, lora=True).train()
    rows = [[tiny_ppo.timeless(row) for row in tiny_ppo.metrics(tmp_path / name)] for name in ("with", "without")]
    assert len(rows[0]) == len(rows[1]) > 1
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_full_fine_tuning_learns_and_scores_without(tmp_path, monkeypatch):
    seen, active = [], FrozenLayouts.active
    monkeypatch.setattr(FrozenLayouts, "active", lambda self, *models: seen.append(models) or active(self, *models))
    tiny_ppo.trainer(tmp_path, max_steps=1).train()
    assert set(seen) == {()}


def test_bytes_of_a_layout_by_hand():
    model = adapted()
    # Two layers: q and o 32 x 32, k and v 32 x 16, three of the MLP 32 x 64; the head, tied to embeddings, 400 x 32.
    frozen = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 400 * 32
    assert layout_bytes(model, 2, frozen=True) == 2 * frozen
    assert layout_bytes(tiny.llama(), 4) == 4 * frozen
    assert layout_bytes(tiny.llama(), 4, frozen=True) == 0
