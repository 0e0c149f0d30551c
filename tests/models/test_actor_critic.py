"""With adapters, two backbones play four roles: off means the model as it was."""

import obvious
import pytest
import tiny
import torch
from peft import LoraConfig
from torch.testing import assert_close

from rlhf.config import PPOConfig
from rlhf.errors import UserError
from rlhf.models.actor_critic import ActorCritic, FrozenRole, ValueHead, keep_adapter
from rlhf.models.lora import add_lora
from rlhf.ppo.roles import build_roles
from rlhf.reward.scoring import score_tokens

IDS = torch.tensor([[9, 9, 5, 6, 7, 8, 2], [11, 12, 13, 14, 15, 16, 17]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7], dtype=torch.bool)
FAMILIES = [(tiny.gpt2, tiny.gpt2_reward), (tiny.llama, tiny.llama_reward)]


LORA = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def roles(policy, reward):
    args = PPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False)
    return build_roles(args, policy, None, reward, None, LORA)


def logp(model):
    with torch.no_grad():
        return obvious.logp(obvious.response_logits(model, IDS, MASK, 3)[:, :-1], IDS[:, -3:], 0.7)[0]


def move_adapters(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)


@pytest.mark.parametrize(("make", "make_reward"), FAMILIES, ids=["gpt2", "llama"])
@torch.no_grad()
def test_adapter_off_is_reference_and_reward(make, make_reward):
    expected, expected_score = logp(make()), score_tokens(make_reward(), IDS, MASK)
    built = roles(make(), make_reward())
    trained = built.trained.eval()
    move_adapters(trained)
    with built.reference.active() as model:
        assert_close(logp(model), expected, atol=1e-6, rtol=0)
    with built.reward.active():
        assert_close(score_tokens(built.reward.base, IDS, MASK), expected_score, atol=1e-6, rtol=0)
    moved, _, values = trained(IDS, MASK, 3)
    assert (moved - expected).abs().max() > 1e-3
    assert (values[:, -1] - expected_score).abs().max() > 1e-3


@pytest.mark.parametrize("kept", [False, True], ids=["off", "copy"])
def test_an_error_inside_a_frozen_role_leaves_the_adapters_as_they_were(kept):
    policy = add_lora(tiny.llama(), LORA)
    move_adapters(policy)
    role = FrozenRole(policy, shared=True, adapter=keep_adapter(policy) if kept else None)
    policy.eval()
    before, trained = logp(policy), [n for n, p in policy.named_parameters() if p.requires_grad]
    with pytest.raises(ZeroDivisionError), role.active():
        raise ZeroDivisionError
    assert torch.equal(logp(policy), before)
    assert [n for n, p in policy.named_parameters() if p.requires_grad] == trained


@torch.no_grad()
def test_a_kept_adapter_stays_while_the_other_is_trained():
    policy = add_lora(tiny.llama(), LORA)
    move_adapters(policy)
    policy.eval()
    start = logp(policy)
    role = FrozenRole(policy, shared=True, adapter=keep_adapter(policy))
    move_adapters(policy)
    with role.active() as model:
        assert_close(logp(model), start, atol=1e-6, rtol=0)
    assert (logp(policy) - start).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_a_head_on_the_trunk_reads_the_policys_last_states(make):
    policy, head = make(), ValueHead(32)
    assert torch.equal(head(torch.randn(2, 3, 32)), torch.zeros(2, 3))
    head.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    _, _, values = ActorCritic(policy, head, 0.7)(IDS, MASK, 3)
    hidden = policy(IDS[1:], output_hidden_states=True).hidden_states[-1]  # the second row has no padding
    assert_close(values[1], head(hidden)[0, -4:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_separate_critic_gives_one_value_more_than_tokens():
    policy, critic = tiny.llama(), tiny.llama_reward()
    _, _, values = ActorCritic(policy, critic, 0.7)(IDS, MASK, 3)
    assert_close(values, obvious.token_values(critic, IDS, MASK)[:, -4:], atol=1e-6, rtol=0)


def test_the_value_of_a_token_is_that_of_the_state_before_it():
    trained = roles(tiny.llama(), tiny.llama_reward()).trained.eval()
    changed = IDS.clone()
    changed[:, -1] = 50
    with torch.no_grad():
        assert torch.equal(trained(IDS, MASK, 3)[2][:, :-1], trained(changed, MASK, 3)[2][:, :-1])


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_in_training_mode_the_dropout_of_adapters_alone_is_on(kind):
    """GPT-2's is a module, OPT's a number that its layers hand to a function."""
    model = {"gpt2": tiny.gpt2, "opt": tiny.opt}[kind]()
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    trained = ActorCritic(add_lora(model, config), ValueHead(32), 0.7)

    def of(mode):
        return trained.train(mode)(IDS, MASK, 3)[0]

    assert torch.equal(of(True), of(False))  # a fresh adapter adds nothing
    move_adapters(trained)
    assert torch.equal(of(False), of(False))
    assert not torch.equal(of(True), of(False))


@pytest.mark.parametrize("quantised", [False, True])
def test_a_frozen_model_is_moved_or_refused(quantised):
    """Quantised weights stay where they were loaded; on another device every rollout would fail."""
    model = tiny.llama()
    model.is_quantized = quantised
    role = FrozenRole(model)
    if quantised:
        role.to(torch.device("cpu"))  # where it is
        with pytest.raises(
            UserError, match=r"^LlamaForCausalLM: the quantised model must be on meta, .* but is on cpu; .*\{'': 0\}$"
        ):
            role.to(torch.device("meta"))
        with pytest.raises(UserError, match=r"load it with device_map=\{'': 3\}$"):
            role.to(torch.device("meta", 3))
        role.to(torch.device("cpu", 0))  # the same kind
    else:
        role.to(torch.device("meta"))
    assert model.device.type == ("cpu" if quantised else "meta")


@torch.no_grad()
def test_the_adapter_that_is_kept_is_the_active_one_and_is_put_back():
    """Of two; other names are taken, twice."""
    policy = add_lora(tiny.llama(), LORA)
    for name in ("second", "reference", "reference_"):
        policy.add_adapter(name, LORA)
    policy.set_adapter("second")
    move_adapters(policy)
    policy.eval()
    start = logp(policy)
    kept = keep_adapter(policy)
    assert (kept, policy.active_adapter) == ("reference__", "second")
    assert torch.equal(logp(policy), start)
    role = FrozenRole(policy, shared=True, adapter=kept)
    move_adapters(policy)
    moved = logp(policy)
    with role.active() as model:
        assert_close(logp(model), start, atol=1e-6, rtol=0)
    assert policy.active_adapter == "second"
    assert torch.equal(logp(policy), moved)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_that_trains_biases_cannot_be_kept(bias):
    policy = add_lora(tiny.llama(), LORA)
    policy.peft_config["default"].bias = bias
    with pytest.raises(UserError, match=f"expected an adapter with bias 'none', found '{bias}'"):
        keep_adapter(policy)


def test_what_is_sharded_one_by_one_is_named_by_both_models_and_there():
    gpt2, llama = tiny.gpt2(), tiny.llama_reward()
    assert ActorCritic(gpt2, llama, 0.7)._no_split_modules == ["GPT2Block", "LlamaDecoderLayer"]
    llama._no_split_modules = {"LlamaDecoderLayer", "Unknown"}
    assert ActorCritic(gpt2, llama, 0.7)._no_split_modules == ["GPT2Block", "LlamaDecoderLayer"]
    assert ActorCritic(gpt2, ValueHead(32), 0.7)._no_split_modules == ["GPT2Block"]
