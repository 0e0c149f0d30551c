"""A model is refused at start where one way of computing gives other numbers than another."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig
from tiny_ppo import trainer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel

from rlhf.errors import UserError
from rlhf.models.actor_critic import ActorCritic
from rlhf.ppo import self_check
from rlhf.ppo.self_check import check_models

IDS = {"vocab_size": 400, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def start(tmp_path, model, **options):
    reward = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
    return trainer(tmp_path, reward=reward, given={"model": model}, critic="shared", **options)


OTHERS = {
    "no decoder": (lambda: BertLMHeadModel(BertConfig(**WIDTHS, **IDS)), "BertLMHeadModel"),
    "encoder and decoder": (
        lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, **IDS)),
        "model: expected a causal language model, found a T5ForConditionalGeneration",
    ),
    "masked tokens": (
        lambda: BertForMaskedLM(BertConfig(**WIDTHS, **IDS)),
        "model: expected a causal .* BertForMaskedLM",
    ),
    "no head": (lambda: tiny.llama().model, "model: expected a causal language model, found a LlamaModel"),
    "state in its modules": (
        lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(lru_width=32, attention_window_size=8, **WIDTHS, **IDS)),
        "RecurrentGemmaForCausalLM",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_kind_of_model_that_cannot_be_trained_right_is_one_line_at_start(tmp_path, kind):
    make, words = OTHERS[kind]
    torch.manual_seed(0)
    with pytest.raises(UserError, match=words) as caught:
        start(tmp_path, make().eval())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_read", [True, False])
def test_an_adapter_on_a_layer_whose_weight_is_read_without_a_call_is_refused(tmp_path, monkeypatch, is_read):
    """It would count only once merged. Where nothing reads the weight, as of an expert without a token, it may."""

    def forward(self, x):
        gate = torch.nn.functional.linear(x, self.gate_proj.weight) if is_read else x.new_ones(())
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    model, config = tiny.llama(), LoraConfig(r=2, target_modules=["gate_proj", "up_proj"])
    before = model.model.layers[0].mlp.gate_proj.weight.clone()
    with (
        pytest.raises(UserError, match="leave gate_proj out: a LlamaForCausalLM reads its weight without calling it")
        if is_read
        else nullcontext()
    ):
        trainer(tmp_path, given={"model": model, "peft_config": config}, critic="shared")
    assert torch.equal(model.model.layers[0].mlp.gate_proj.weight, before)


def broken(monkeypatch, when, change):
    """Llama's trunk with other states in some passes: when is asked with ids and use_cache."""
    forward = LlamaModel.forward

    def other(self, input_ids=None, **given):
        found = forward(self, input_ids=input_ids, **given)
        if when(self, input_ids, given.get("use_cache")):
            found.last_hidden_state = change(found.last_hidden_state)
        return found

    monkeypatch.setattr(LlamaModel, "forward", other)


def noise(states):
    return states + 0.05 * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))


BREAKS = {
    "in a batch": (lambda self, ids, cache: len(ids) > 1 and not cache, "model: .*in a batch"),
    "while sampling": (lambda self, ids, cache: ids.shape[1] == 1 and cache, "model: .*while sampling"),
    "after rows have left": (lambda self, ids, cache: len(ids) == 2 and cache, "model: .*while sampling"),
    "of a reference": (
        lambda self, ids, cache: len(ids) > 1 and getattr(self, "role", "") == "the reference",
        "ref_model: .*in a batch",
    ),
    "of a critic": (
        lambda self, ids, cache: len(ids) > 1 and not hasattr(self, "role"),
        "value_model: .*in a batch",
    ),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_each_way_of_computing_is_compared(tmp_path, monkeypatch, kind):
    when, words = BREAKS[kind]
    policy, value, reference = tiny.llama(), tiny.llama_reward(), tiny.llama()
    for model in (policy, value, reference):
        model.set_attn_implementation("eager")  # texts in a batch, not packed
    policy.model.role, reference.model.role = "the policy", "the reference"
    broken(monkeypatch, when, noise)
    with pytest.raises(UserError, match=words):
        trainer(tmp_path, given={"model": policy, "ref_model": reference, "value_model": value})


def test_what_is_on_while_learning_alone_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ActorCritic, "train", torch.nn.Module.train)
    with pytest.raises(UserError, match=r"model: .* OPTForCausalLM log-probs change in training mode, by"):
        start(tmp_path, tiny.opt())


def test_a_critic_that_says_other_things_while_learning_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ActorCritic, "train", torch.nn.Module.train)
    broken(monkeypatch, lambda self, ids, cache: self.training and not hasattr(self, "role"), noise)
    policy = tiny.llama()
    policy.model.role = "not the critic"
    with pytest.raises(UserError, match=r"^value_model: .* LlamaForSequenceClassification states change in training"):
        trainer(tmp_path, given={"model": policy, "value_model": tiny.llama_reward()})


def test_the_check_leaves_no_trace(tmp_path):
    roles = trainer(tmp_path, lora=True).roles
    state = torch.get_rng_state()
    check_models(roles.trained, roles.reference)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in roles.trained.modules())


def test_a_layer_of_whole_numbers_is_not_turned_round():
    layer = SimpleNamespace(get_base_layer=lambda: SimpleNamespace(weight=torch.ones(2, dtype=torch.uint8)))
    trained = SimpleNamespace(policy=SimpleNamespace(get_submodule={"a": layer}.get))
    self_check._check_silent(trained, "a")  # it would read the policy, which is not there


def test_too_little_memory_is_no_fault_of_a_model():
    with pytest.raises(torch.OutOfMemoryError), self_check._tried("model", tiny.llama()):
        raise torch.OutOfMemoryError
    words = r"^model: .* a LlamaForCausalLM fails in a try: KeyError: 'x'$"
    with pytest.raises(UserError, match=words), self_check._tried("model", tiny.llama()):
        raise KeyError("x")
