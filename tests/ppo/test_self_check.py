"""A model is refused at start where one way of computing gives other numbers than another."""

import pytest
import tiny
import torch
from tiny_ppo import trainer
from transformers import BertConfig, BertLMHeadModel, RecurrentGemmaConfig
from transformers import RecurrentGemmaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaModel

from rlhf.errors import UserError

IDS = {"vocab_size": 400, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def start(tmp_path, model, **options):
    return trainer(
        tmp_path, reward=lambda completions, **_: [0.0] * len(completions), given={"model": model}, **options
    )


OTHERS = {
    "no decoder": (lambda: BertLMHeadModel(BertConfig(**WIDTHS, **IDS)), "BertLMHeadModel"),
    "encoder and decoder": (
        lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, **IDS)),
        "T5ForConditionalGeneration",
    ),
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
        start(tmp_path, make().eval(), critic="shared")
    assert "\n" not in str(caught.value)


def broken(monkeypatch, when, change):
    """Llama's trunk with other states in some passes: when and change are of its arguments and its states."""
    forward = LlamaModel.forward

    def other(self, input_ids=None, **given):
        found = forward(self, input_ids=input_ids, **given)
        if when(self, input_ids, given):
            found.last_hidden_state = change(found.last_hidden_state)
        return found

    monkeypatch.setattr(LlamaModel, "forward", other)


def noise(states):
    return states + 0.05 * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))


BREAKS = {
    "in a batch": (lambda self, ids, given: len(ids) > 1 and not given.get("use_cache"), "model: .*in a batch"),
    "in training": (lambda self, ids, given: self.rotary_emb.training, "model: .*in training mode"),
    "while sampling": (lambda self, ids, given: ids.shape[1] == 1 and given.get("use_cache"), "model: .*while sampling"),
    "after rows have left": (lambda self, ids, given: len(ids) == 2 and given.get("use_cache"), "model: .*while sampling"),
    "critic": (lambda self, ids, given: len(ids) > 1 and not hasattr(self, "is_policy"), "value_model: .*in a batch"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BREAKS)
def test_each_way_of_computing_is_compared(tmp_path, monkeypatch, kind):
    when, words = BREAKS[kind]
    policy = tiny.llama()
    policy.set_attn_implementation("eager")  # texts in a batch, not packed
    policy.model.is_policy = True
    value = tiny.llama_reward()
    value.set_attn_implementation("eager")
    broken(monkeypatch, when, noise)
    if kind == "in training":  # a module that the trainer would have to leave on
        policy.model.rotary_emb.train = lambda mode=True: setattr(policy.model.rotary_emb, "training", True)
        value.model.rotary_emb.eval()
    given = {"model": policy, "ref_model": tiny.llama(), "value_model": value}
    with pytest.raises(UserError, match=words):
        trainer(tmp_path, given=given)


def test_the_check_leaves_no_trace(tmp_path):
    state = torch.get_rng_state()
    run = start(tmp_path, tiny.llama(), critic="shared")
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in run.roles.trained.modules())
