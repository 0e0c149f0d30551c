"""A reward model with an adapter: its head is trained, and what is saved gives the scores that were trained."""

import pytest
import tiny
import torch
from peft import PeftModel
from test_trainer import config
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM
from trl import ModelConfig

from rlhf.data.chat import prepare_tokenizer
from rlhf.data.hh_rlhf import load_pairs
from rlhf.errors import UserError
from rlhf.models.load import load_reward_model, model_options, new_reward_model
from rlhf.models.quantised import prepare_4bit
from rlhf.reward.adapters import check_adapter_engine, lora_config, save_reward_model, with_adapter
from rlhf.reward.scoring import score_rows
from rlhf.reward.trainer import encode_pairs, train_reward_model


def wide_llama():
    """Wide enough for whole blocks of 64 weights, which share a scale in 4 bits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=400, eos_token_id=2, initializer_range=0.1))


FAMILIES = {
    "llama": (tiny.llama, tiny.chat_tokenizer, {}),
    "gpt2": (tiny.gpt2, tiny.gpt2_tokenizer, {}),
    "bfloat16": (tiny.llama, tiny.chat_tokenizer, {"dtype": "bfloat16"}),
    "4 bits": (wide_llama, tiny.chat_tokenizer, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "8 bits": (wide_llama, tiny.chat_tokenizer, {"load_in_8bit": True}),
}


SLOW = ("llama", "bfloat16", "8 bits")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FAMILIES]
)
def test_what_is_saved_scores_as_what_was_trained(family, tmp_path):
    make, make_tokenizer, given = FAMILIES[family]
    settings = ModelConfig(use_peft=True, lora_r=2, lora_dropout=0.0, **given)
    base = tmp_path / "base"
    make().save_pretrained(base)
    tokenizer = prepare_tokenizer(make_tokenizer())
    _, rows = encode_pairs(tokenizer, load_pairs("demo:preferences.jsonl")[0], 200)
    texts = [row[side] for row in rows[:8] for side in ("chosen_ids", "rejected_ids")]
    load = lambda: new_reward_model(str(base), tokenizer, **model_options(settings))  # noqa: E731
    model = with_adapter(load(), lora_config(settings))
    head = model.score.weight.detach().clone()
    before = score_rows(model.eval(), texts, 4)
    args = config(tmp_path / "run", max_steps=2, learning_rate=1e-2, eval_steps=2, per_device_train_batch_size=4)
    trainer, _ = train_reward_model(model, tokenizer, rows[:12], rows[12:16], args)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition("lora_")[2].partition(".")[0] for name in trained if "lora_" in name} == {"A", "B"}
    assert [name.partition(".model.")[2] for name in trained if "lora_" not in name] == [
        "score.modules_to_save.default.weight"
    ]
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert not torch.equal(model.score.weight, head)
    scores = score_rows(model.eval(), texts, 4)
    assert (scores - before).abs().max() > 0.1

    save_reward_model(trainer, tmp_path / "saved", load)
    # In 8 bits activations are rounded as well, but not in the model that is saved.
    size = {"bfloat16": 2e-2, "8 bits": 5e-2}.get(family, 1e-4)
    close = {"atol": size, "rtol": size}
    saved = load_reward_model(str(tmp_path / "saved"))
    assert not hasattr(saved.config, "quantization_config")
    assert_close(score_rows(saved, texts, 4), scores, **close)
    again = PeftModel.from_pretrained(load(), str(tmp_path / "saved" / "adapter")).eval()
    prepare_4bit("again", again)
    assert_close(score_rows(again, texts, 4), scores, **close)


def test_adapters_on_sharded_weights_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_adapter_engine(ModelConfig())
    with pytest.raises(UserError, match=r"use_peft: .* without ZeRO-3 or FSDP"):
        check_adapter_engine(ModelConfig(use_peft=True))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    check_adapter_engine(ModelConfig(use_peft=True))
    monkeypatch.setattr("rlhf.reward.adapters.is_deepspeed_zero3_enabled", lambda: True)
    check_adapter_engine(ModelConfig())
    with pytest.raises(UserError, match=r"use_peft: .* without ZeRO-3 or FSDP"):
        check_adapter_engine(ModelConfig(use_peft=True))
