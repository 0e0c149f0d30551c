"""The fast way is the slow, obvious way: log-probs, entropies, values, losses and gradients on ragged rows."""

import copy
import math
from types import SimpleNamespace

import obvious
import pytest
import tiny
import torch
from torch.testing import assert_close
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
)

from rlhf.errors import UserError
from rlhf.functional.batching import left_pad, right_pad
from rlhf.functional.losses import policy_loss, value_loss
from rlhf.models import actor_critic as response
from rlhf.models.actor_critic import (
    ActorCritic,
    ValueHead,
    check_head,
    exact_kl,
    head_logits,
    in_chunks,
    logp_of,
    texts_of,
    trunk_states,
)
from rlhf.models.kernels.dropout_gelu import fuse_gelu

PROMPTS = [list(range(3, 3 + n)) for n in (9, 1, 4, 17, 2)]
RESPONSES = [list(range(50, 50 + n)) for n in (1, 7, 3, 5, 2)]
FAMILIES = {"gpt2": (tiny.gpt2, tiny.gpt2_reward), "llama": (tiny.llama, tiny.llama_reward)}


def packed():
    prompt_ids, prompt_mask = left_pad(PROMPTS, 2)
    ids, mask = right_pad(RESPONSES, 2)
    return torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1), mask


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(module, logp, values, mask):
    """Of PPO's loss with advantages, old log-probs and returns near the new ones, so that clips bite."""
    old = logp.detach() + 0.3 * noise(*mask.shape, seed=1)
    old_values = values.detach()[:, :-1] + 0.3 * noise(*mask.shape, seed=2)
    advantages, returns = noise(*mask.shape, seed=3), old_values + noise(*mask.shape, seed=4)
    n = mask.sum()
    loss = policy_loss(logp, old, advantages, mask, 0.2, n)
    loss = loss + 0.1 * value_loss(values[:, :-1], old_values, returns, mask, 0.2, n)
    module.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [None, 7], ids=["whole", "in chunks"])
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_whole_logits_on_padded_rows(monkeypatch, family, shared, chunk):
    make, make_reward = FAMILIES[family]
    policy = make()
    head = ValueHead(32)
    torch.nn.init.normal_(head.score.weight, generator=torch.Generator().manual_seed(7))
    fast = ActorCritic(policy, head if shared else make_reward(), 0.7)
    slow = copy.deepcopy(fast)
    fuse_gelu(fast)
    if chunk:  # rows of 7 logits at a time, made once more in the backward pass
        monkeypatch.setattr(response, "_MOST_LOGITS", chunk * policy.config.vocab_size)
    ids, attention, mask = packed()
    logp, entropy, values = fast(ids, attention, mask.shape[1])
    loss, grads = gradients(fast, logp, values, mask)

    logits = obvious.response_logits(slow.policy, ids, attention, mask.shape[1])
    expected_logp, expected_entropy = obvious.logp(logits[:, :-1], ids[:, -mask.shape[1] :], 0.7)
    if shared:
        kwargs = {"attention_mask": attention.long(), "position_ids": obvious.position_ids(attention)}
        hidden = slow.policy(input_ids=ids, output_hidden_states=True, **kwargs).hidden_states[-1]
        expected_values = slow.critic(hidden)[:, -mask.shape[1] - 1 :]
    else:
        expected_values = obvious.token_values(slow.critic, ids, attention)[:, -mask.shape[1] - 1 :]
    expected_loss, expected_grads = gradients(slow, expected_logp, expected_values, mask)

    assert_close(logp[mask], expected_logp[mask], atol=1e-5, rtol=0)
    assert_close(entropy[mask], expected_entropy[mask], atol=1e-5, rtol=0)
    assert (logp[~mask] == 0).all()
    wide = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)  # a value more than there are tokens
    assert_close(values[wide], expected_values[wide], atol=1e-5, rtol=0)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], atol=1e-5, rtol=1e-4, msg=name)


def cohere():
    config = CohereConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        logit_scale=0.25,
    )
    return CohereForCausalLM(config)


def gemma():
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.3,
    )
    return Gemma2ForCausalLM(config)


def of_kind(kind, **options):
    """A tiny model of a kind; its weights are large enough that a scale or a cap tells."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1}
    config = CONFIG_MAPPING[kind](**sizes | heads | {"eos_token_id": 2, "initializer_range": 0.2} | options)
    return AutoModelForCausalLM.from_config(config)


SCALED_OR_CAPPED = {
    "cohere": cohere,
    "gemma2": gemma,
    "gpt2": tiny.gpt2,
    "gemma3_text": lambda: of_kind("gemma3_text", final_logit_softcapping=0.3),
    "granite": lambda: of_kind("granite", logits_scaling=8.0),
    "hyperclovax": lambda: of_kind("hyperclovax", logits_scaling=0.125),
    "minicpm3": lambda: of_kind("minicpm3", q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8),
    "nanochat": lambda: of_kind("nanochat", final_logit_softcapping=0.3),
    "recurrent_gemma": lambda: of_kind("recurrent_gemma", logits_soft_cap=0.3, lru_width=32, num_hidden_layers=3),
    "falcon_h1": lambda: of_kind(
        "falcon_h1", lm_head_multiplier=0.25, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8
    ),
    "phi": lambda: of_kind("phi"),
}


@pytest.mark.parametrize("kind", SCALED_OR_CAPPED)
@torch.no_grad()
def test_a_model_that_scales_or_caps_its_logits_does_so_here_too(kind):
    torch.manual_seed(0)
    model = SCALED_OR_CAPPED[kind]().eval()
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    states = trunk_states(model, ids)[0]
    assert_close(head_logits(model, states), model(ids).logits[0], atol=1e-6, rtol=0)
    if kind not in ("gpt2", "phi"):
        assert not torch.allclose(model.get_output_embeddings()(states), model(ids).logits[0], atol=1e-3)
    check_head("model", model)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"logits_scaling": 2.0}, 1.5),
        ({"logits_scaling": 2.0, "model_type": "hyperclovax_text"}, 6.0),
        ({"logit_scale": 2}, 6.0),
        ({"lm_head_multiplier": 2.0}, 6.0),
        ({"output_multiplier": 2.0}, 6.0),
        ({"final_logit_softcapping": 2.0}, 2 * math.tanh(1.5)),
        ({"logits_soft_cap": 2.0}, 2 * math.tanh(1.5)),
        ({"output_logit_soft_cap": 2.0}, 2 * math.tanh(1.5)),
        ({"softcap": 2.0}, 2 * math.tanh(1.5)),
        ({"logits_scaling": 2.0, "logit_scale": 8.0, "softcap": 4.0}, 4 * math.tanh(3.0)),  # in this order
        ({"logit_scale": None, "softcap": None}, 3.0),
    ],
)
def test_a_logit_of_three_by_each_field_of_a_config(fields, expected):
    config = SimpleNamespace(**{"model_type": "llama", **fields})
    base = SimpleNamespace(get_output_embeddings=lambda: torch.nn.Identity())
    base.config = SimpleNamespace(get_text_config=lambda decoder: config if decoder else None)
    assert head_logits(base, torch.tensor([3.0])).item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["cohere", "gemma2", "gpt2", "granite"])
def test_models_in_16_bits_pass_the_check_of_their_heads(kind, dtype):
    model = SCALED_OR_CAPPED[kind]().to(dtype).train()
    check_head("model", model)
    assert all(module.training for module in model.modules())


class Odd(LlamaForCausalLM):
    """Doubles its logits by no field of its config."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def bert():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertLMHeadModel(BertConfig(vocab_size=64, is_decoder=True, **sizes))


@pytest.mark.parametrize("make", [lambda: Odd(tiny.llama().config), bert])
def test_a_model_whose_logits_are_made_in_another_way_is_refused(make):
    model = make()
    with pytest.raises(UserError, match=f"^ref_model: logits of a {type(model).__name__} are more than its output"):
        check_head("ref_model", model)


def test_texts_have_no_gap_and_know_where_their_tokens_are():
    first, second = texts_of(PROMPTS, RESPONSES, [[0, 3], [4, 1, 2]], 7, "cpu")
    assert first.ids.shape == (2, 22)
    assert second.ids.shape == (3, 8)
    for texts, rows in ((first, [0, 3]), (second, [4, 1, 2])):
        whole = [PROMPTS[i] + RESPONSES[i] for i in rows]
        assert texts.lengths.tolist() == [len(row) for row in whole]
        for row, text in zip(texts.ids.tolist(), whole, strict=True):
            assert row[: len(text)] == text
        assert texts.tokens.tolist() == [token for i in rows for token in RESPONSES[i]]
        assert texts.ids.flatten()[texts.before + 1].tolist() == texts.tokens.tolist()
        assert texts.ids.flatten()[texts.last].tolist() == [RESPONSES[i][-1] for i in rows]
    assert first.before.tolist() == [8, 22 + 16, 22 + 17, 22 + 18, 22 + 19, 22 + 20]
    assert second.places.tolist() == [28, 29, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]  # row x 7 + column


def test_what_is_picked_at_tokens_sends_its_gradient_back_there():
    (texts,) = texts_of(PROMPTS, RESPONSES, [[0, 3, 1]], 7, "cpu")
    states = noise(3, 22, 2, seed=0).requires_grad_()
    weights = noise(13, 2, seed=1)
    (texts.at_tokens(states) * weights).sum().backward()
    found, states.grad = states.grad, None
    (states.flatten(0, 1)[texts.before] * weights).sum().backward()
    assert torch.equal(found, states.grad)


def test_no_more_logits_at_once_than_asked_for(monkeypatch):
    monkeypatch.setattr(response, "_MOST_LOGITS", 3 * 11)
    seen = []

    def look(x):
        seen.append(len(x))
        return (x.exp().sum(1),)

    x = torch.randn(8, 11, requires_grad=True)
    (result,) = in_chunks(look, 11, x)
    assert seen == [3, 3, 2]
    assert_close(result, x.exp().sum(1))
    result.sum().backward()
    assert sorted(seen) == [2, 2, 3, 3, 3, 3]  # each once more
    assert_close(x.grad, x.detach().exp())
    seen.clear()
    in_chunks(look, 11, x[:3])[0].sum().backward()
    in_chunks(look, 99, x[:2])[0].sum().backward()  # not one row fits
    assert seen == [3, 1, 1, 1, 1]


def test_the_check_of_a_head_leaves_each_part_in_its_mode():
    model = tiny.llama().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    check_head("model", model)
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_their_gradient_are_those_of_log_softmax(temperature):
    logits, tokens = noise(6, 13, seed=0).requires_grad_(), torch.tensor([0, 12, 5, 5, 1, 3])
    weights = noise(6, seed=1)
    logp, entropy = logp_of(logits, tokens, temperature)
    (logp * weights).sum().backward()
    grad, logits.grad = logits.grad, None
    expected, expected_entropy = obvious.logp(logits, tokens, temperature)
    (expected * weights).sum().backward()
    assert_close(logp, expected, atol=1e-6, rtol=0)
    assert_close(entropy, expected_entropy, atol=1e-6, rtol=0)
    assert_close(grad, logits.grad, atol=1e-6, rtol=0)
    assert not entropy.requires_grad


def test_exact_kl_leaves_its_arguments_as_they_are():
    one, two = noise(4, 13, seed=0), noise(4, 13, seed=1)
    kept = one.clone(), two.clone()
    exact_kl(one, two, 1.0)
    assert torch.equal(one, kept[0])
    assert torch.equal(two, kept[1])


@torch.no_grad()
def test_autocast_does_not_round_entropy_and_kl():
    one, two, tokens = noise(50, 64, seed=0), noise(50, 64, seed=1), torch.zeros(50, dtype=torch.long)
    expected = logp_of(one, tokens, 0.7)[1], exact_kl(one, two, 0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logp_of(one, tokens, 0.7)[1], exact_kl(one, two, 0.7)
    assert_close(found, expected, atol=1e-6, rtol=0)
