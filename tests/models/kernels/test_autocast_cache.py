"""Frozen weights in autocast's precision: the same numbers, and the same weights afterwards."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from rlhf.generation import decode as engine
from rlhf.generation.decode import uniforms
from rlhf.models.kernels.autocast_cache import frozen_cast
from rlhf.models.lora import add_lora

GPT2_LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def adapted(make=tiny.llama, lora=LORA):
    torch.manual_seed(0)
    return get_peft_model(make(), lora).eval()


def gpt2():
    model = add_lora(tiny.gpt2(), GPT2_LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def test_weights_that_an_adapter_reads_by_itself_are_left_alone():
    model = adapted(lora=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True))
    with torch.autocast(**BF16), frozen_cast(model):
        kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {kind for name, kind in kinds.items() if "q_proj" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "k_proj" in name} == {torch.bfloat16}


def test_a_layer_whose_forward_pass_somebody_has_replaced_keeps_its_weights():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).requires_grad_(False)
    model[0].forward = lambda x: x + model[0].weight.sum()
    with torch.autocast(**BF16), frozen_cast(model):
        assert [layer.weight.dtype for layer in model] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("make", [adapted, gpt2])
@torch.no_grad()
def test_logits_are_the_same_to_the_last_bit(make):
    model, ids = make(), torch.arange(3, 43).reshape(2, 20)
    with torch.autocast(**BF16):
        expected = model(ids).logits
        with frozen_cast(model):
            kinds = {p.dtype for name, p in model.named_parameters() if "mlp" in name}
            assert torch.bfloat16 in kinds
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
            assert torch.equal(model(ids).logits, expected)


def test_several_models_are_cast_once_for_all_passes_inside():
    one, other = adapted(), tiny.gpt2_reward().requires_grad_(False)
    before = [*one.parameters(), *other.parameters()]
    with frozen_cast(one, other, one, dtype=torch.bfloat16):  # no autocast is on yet
        kinds = {p.dtype for p in other.transformer.h.parameters() if p.ndim > 1}
        assert kinds == {torch.bfloat16}
        assert {p.dtype for p in one.parameters() if p.requires_grad} == {torch.float32}
        assert any(p.dtype == torch.bfloat16 for p in one.parameters())
    assert all(a is b for a, b in zip([*one.parameters(), *other.parameters()], before, strict=True))


def test_weights_are_themselves_afterwards_also_the_tied_ones_and_after_an_error():
    model = gpt2()
    before = dict(model.named_parameters())
    base = model.get_base_model()
    seen = []

    def stopped():
        with torch.autocast(**BF16), frozen_cast(model):
            seen.extend([base.lm_head.weight.dtype, base.transformer.wte.weight.dtype])
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stopped()
    assert seen == [torch.bfloat16, torch.float32]  # autocast rounds no embedding
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert base.lm_head.weight is base.transformer.wte.weight


def test_nothing_happens_without_autocast_and_to_what_is_trained():
    model = adapted()
    with frozen_cast(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    whole = tiny.llama()
    with torch.autocast(**BF16), frozen_cast(whole):
        assert {p.dtype for p in whole.parameters()} == {torch.float32}


def test_responses_are_the_same(monkeypatch):
    model, prompts = adapted(), [[5, 6, 7], [8], [9, 10]]
    u = uniforms(0, 0, ["a", "b", "c"], 8)
    kinds = []
    base = model.get_base_model()
    head = base.lm_head
    seen = base.register_forward_pre_hook(lambda *_: kinds.append(head.weight.dtype))
    with torch.autocast(**BF16):
        found = engine.generate(model, prompts, u, [1], 1.0)
        seen.remove()
        assert set(kinds) == {torch.bfloat16}
        monkeypatch.setattr(engine, "frozen_cast", lambda model: torch.no_grad())
        assert found == engine.generate(model, prompts, u, [1], 1.0)
