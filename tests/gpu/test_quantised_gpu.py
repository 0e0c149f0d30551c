"""bitsandbytes: adapters on a 4-bit base, and AdamW with a state of 8 bits."""

import bitsandbytes as bnb
import pytest
import torch
from tiny_ppo import LORA, metrics, trainer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)


def config(**options):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(
        vocab_size=400, **sizes, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, initializer_range=0.1, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(folder / "policy")
    LlamaForSequenceClassification(config(num_labels=1)).save_pretrained(folder / "reward")
    return folder


def test_adapters_learn_on_a_4_bit_base_that_stays(tmp_path, device, place, folders):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    given = {
        "model": AutoModelForCausalLM.from_pretrained(
            folders / "policy", quantization_config=options, device_map={"": device}
        ),
        "reward_model": AutoModelForSequenceClassification.from_pretrained(
            folders / "reward", quantization_config=options, device_map={"": device}
        ),
        "peft_config": LORA,
    }
    run = trainer(tmp_path, given=given, max_steps=2, learning_rate=1e-2, bf16=device.type == "cuda", **place)
    codes = [module.weight for module in run.roles.trained.modules() if isinstance(module, bnb.nn.Linear4bit)]
    before = [weight.detach().clone() for weight in codes]
    adapters = {name: p.detach().clone() for name, p in run.roles.trained.named_parameters() if p.requires_grad}
    run.train()
    first, second = metrics(tmp_path)
    assert first["objective/kl_exact_per_token"] < 1e-6 < second["objective/kl_exact_per_token"]
    assert len(codes) == 2 * 14
    assert all(torch.equal(weight, old) for weight, old in zip(codes, before, strict=True))
    now = dict(run.roles.trained.named_parameters())
    assert [name for name, old in adapters.items() if torch.equal(now[name], old)] == []


def test_adamw_keeps_its_state_in_8_bits(tmp_path, device, place):
    run = trainer(tmp_path, optim="adamw_bnb_8bit", max_steps=2, **place)
    run.train()
    embedding = run.roles.trained.policy.get_input_embeddings().weight
    state = run.optimizer.optimizer.state[embedding]
    assert {state[name].dtype for name in ("state1", "state2")} == {torch.uint8}
    assert embedding.device.type == device.type
    assert all(parameter.isfinite().all() for parameter in run.roles.trained.parameters())
    assert metrics(tmp_path)[1]["objective/kl_exact_per_token"] > 0
