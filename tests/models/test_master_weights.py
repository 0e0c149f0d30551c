"""What is trained is float32, however it was loaded: at usual rates 16 bits hold most weights where they are."""

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig
from tiny_ppo import LORA, metrics, trainer

from rlhf.config import RewardStageConfig
from rlhf.data.chat import prepare_tokenizer
from rlhf.data.hh_rlhf import load_pairs
from rlhf.models.load import new_reward_model
from rlhf.models.master_weights import keep_masters
from rlhf.reward.trainer import encode_pairs, train_reward_model

SHORT = (torch.bfloat16, torch.float16)
HEAD_TOO = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
RATE = 3e-6


def moved(before, model):
    """Share of the model's numbers that are others than before."""
    now = dict(model.named_parameters())
    changed = sum(int((now[name] != old).sum()) for name, old in before.items())
    return changed / sum(old.numel() for old in before.values())


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def models(dtype, **more):
    return {"model": tiny.llama().to(dtype), "reward_model": tiny.llama_reward().to(dtype)} | more


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("own", [False, True])
def test_full_fine_tuning_of_16_bit_weights_moves_them(tmp_path, dtype, bf16, own):
    given = models(dtype)
    if own:
        given |= {"ref_model": tiny.llama().to(dtype), "value_model": tiny.llama_reward(5).to(dtype)}
    run = trainer(tmp_path, given=given, learning_rate=RATE, max_steps=2, bf16=bf16)
    parts = run.roles.trained.policy, run.roles.trained.critic
    before = [trained(part) for part in parts]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert {p.dtype for p in run.roles.reward.model.parameters()} == {dtype}  # it is not trained
    run.train()
    assert [moved(*pair) > 0.5 for pair in zip(before, parts, strict=True)] == [True, True]
    assert metrics(tmp_path)[0]["objective/kl_exact_per_token"] == pytest.approx(0, abs=1e-7)


def test_unless_told_otherwise(tmp_path):
    run = trainer(tmp_path, given=models(torch.bfloat16), learning_rate=RATE, max_steps=2, fp32_master_weights=False)
    before = trained(run.roles.trained.policy)
    run.train()
    assert {p.dtype for p in before.values()} == {torch.bfloat16}
    assert moved(before, run.roles.trained.policy) < 0.1


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("config", [LORA, HEAD_TOO], ids=["adapters", "a layer, too"])
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_adapters_heads_and_whole_layers_on_a_16_bit_base(tmp_path, bf16, config, critic):
    given = models(torch.bfloat16, peft_config=copy.deepcopy(config))
    run = trainer(tmp_path, given=given, learning_rate=RATE, max_steps=1, bf16=bf16, critic=critic)
    before = trained(run.roles.trained)
    assert {p.dtype for p in before.values()} == {torch.float32}
    base = run.roles.trained.policy.get_parameter("base_model.model.model.embed_tokens.weight")
    assert base.dtype == (torch.float32 if config is HEAD_TOO and not bf16 else torch.bfloat16)
    run.train()
    assert moved({n: p for n, p in before.items() if "lora_A" not in n}, run.roles.trained) > 0.5


def test_a_reward_model_too(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    tokenizer = prepare_tokenizer(tiny.chat_tokenizer())
    rows = encode_pairs(tokenizer, load_pairs("demo:preferences.jsonl")[0][:24], 200)[1]
    model = new_reward_model(str(tmp_path / "base"), tokenizer, dtype="bfloat16")
    args = RewardStageConfig(
        output_dir=str(tmp_path), max_steps=2, learning_rate=RATE, use_cpu=True, bf16=False, report_to="none"
    )
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    train_reward_model(model, tokenizer, rows[:8], rows[8:12], args)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    seen = {name: old for name, old in before.items() if "embed_tokens" not in name}  # few words are in these texts
    assert moved(seen, model) > 0.5


@pytest.mark.parametrize(
    ("deepspeed", "bf16", "kept"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_deepspeed_keeps_masters_of_its_own_in_mixed_precision_alone(monkeypatch, deepspeed, bf16, kept):
    monkeypatch.setattr("rlhf.models.master_weights.wants_deepspeed", lambda: deepspeed)
    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    keep_masters(SimpleNamespace(bf16=bf16, fp16=False, fp32_master_weights=True), layer)
    assert layer.weight.dtype == (torch.bfloat16 if kept else torch.float32)


def test_weights_that_zero_3_has_sharded_stay_as_they_are():
    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    layer.weight.ds_id = 1
    keep_masters(SimpleNamespace(bf16=True, fp16=False), layer)
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.bfloat16, torch.float32)
