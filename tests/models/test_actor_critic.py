"""With adapters, two backbones play four roles: off means the model as it was."""

import pytest
import tiny
import torch
from peft import LoraConfig
from torch.testing import assert_close

from rlhf.config import PPOConfig
from rlhf.models.actor_critic import disable_dropout, token_logp
from rlhf.models.heads import score_tokens
from rlhf.ppo.roles import build_roles

IDS = torch.tensor([[9, 9, 5, 6, 7, 8, 2], [11, 12, 13, 14, 15, 16, 17]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7], dtype=torch.bool)
FAMILIES = [(tiny.gpt2, tiny.gpt2_reward), (tiny.llama, tiny.llama_reward)]


def roles(policy, reward, **kwargs):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    args = PPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False)
    return build_roles(args, policy, None, reward, None, lora, **kwargs)


def move_adapters(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)


@pytest.mark.parametrize(("make", "make_reward"), FAMILIES, ids=["gpt2", "llama"])
@torch.no_grad()
def test_adapter_off_is_reference_and_reward(make, make_reward):
    expected = token_logp(make(), IDS, MASK, 3, 0.7)[0]
    expected_score = score_tokens(make_reward(), IDS, MASK)
    trained, frozen = roles(make(), make_reward())
    move_adapters(trained)
    trained.eval()
    assert_close(frozen.reference_logp(IDS, MASK, 3, 0.7), expected, atol=1e-6, rtol=0)
    assert_close(frozen.score(IDS, MASK), expected_score, atol=1e-6, rtol=0)
    logp, _, values = trained(IDS, MASK, 3)
    assert (logp - expected).abs().max() > 1e-3
    assert (values[:, -1] - expected_score).abs().max() > 1e-3


def test_an_error_inside_a_frozen_role_leaves_the_adapters_on():
    trained, frozen = roles(tiny.llama(), tiny.llama_reward())
    move_adapters(trained)
    trained.eval()
    with torch.no_grad():
        before = trained(IDS, MASK, 3)
    with pytest.raises(IndexError):
        frozen.reference_logp(IDS + 1000, MASK, 3, 0.7)  # no such tokens
    with torch.no_grad():
        for one, other in zip(before, trained(IDS, MASK, 3), strict=True):
            assert torch.equal(one, other)


def test_the_value_of_a_token_is_that_of_the_state_before_it():
    trained, _ = roles(tiny.llama(), tiny.llama_reward())
    trained.eval()
    changed = IDS.clone()
    changed[:, -1] = 50
    with torch.no_grad():
        assert torch.equal(trained(IDS, MASK, 3)[2], trained(changed, MASK, 3)[2])


def test_disabled_dropout_stays_off_in_train_mode():
    model = tiny.gpt2()
    disable_dropout(model)
    model.train()
    assert torch.equal(model(IDS).logits, model(IDS).logits)
