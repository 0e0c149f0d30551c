"""Scores and values under autocast: those of the head in float32, on the states that the trunk gives."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, Qwen2MoeConfig, Qwen2MoeForSequenceClassification

from rlhf.models.actor_critic import ScalarHead, ValueHead, widen_heads
from rlhf.models.load import new_reward_model

IDS = torch.tensor([[5, 6, 7, 8]])
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_labels": 1}


def bert():
    return BertForSequenceClassification(BertConfig(vocab_size=400, **SIZES)).eval()


def with_adapter():
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    return get_peft_model(tiny.llama_reward(), config).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny.llama_reward, tiny.gpt2_reward, bert, with_adapter])
def test_a_head_of_one_number_is_computed_in_float32(make, dtype):
    model = make().to(dtype)
    names = [name for name, _ in model.named_parameters()]
    widen_heads(model)
    assert [name for name, _ in model.named_parameters()] == names
    seen = []
    for module in model.modules():
        if isinstance(module, ScalarHead):
            module.register_forward_hook(lambda head, given, out: seen.append((head, given[0], out)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS).logits
    ((head, states, out),) = seen
    assert states.dtype == torch.bfloat16 or dtype == torch.float32
    expected = (states.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double())).float()
    assert_close(out, expected, atol=1e-6, rtol=1e-6)
    assert logits.dtype == torch.float32


@torch.no_grad()
def test_the_head_on_the_policys_trunk_too():
    head = ValueHead(32)
    head.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    head.score.bias.fill_(10.0)  # where bfloat16 has steps of 0.06
    states = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        values = head(states)
    assert_close(values.double(), (states.double() @ head.score.weight.double().T).squeeze(-1) + 10, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_new_reward_model_trains_a_head_in_float32(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    model = new_reward_model(str(tmp_path), tiny.chat_tokenizer())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IDS).logits.dtype == torch.float32


def test_gates_of_one_output_in_the_trunk_stay():
    config = Qwen2MoeConfig(vocab_size=400, num_experts=2, moe_intermediate_size=8, pad_token_id=0, **SIZES)
    model = Qwen2MoeForSequenceClassification(config)
    widen_heads(model)
    assert [name for name, m in model.named_modules() if isinstance(m, ScalarHead)] == ["score"]
