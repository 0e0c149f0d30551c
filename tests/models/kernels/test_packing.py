"""Packed texts: where each token goes, by hand; states and gradients of padded ones, for each kind of model."""

import copy

import pytest
import tiny
import torch
from obvious import distinct, widths
from peft import LoraConfig, get_peft_model
from test_attention import model_of
from torch.testing import assert_close
from transformers import LlamaModel

from rlhf.models.actor_critic import ActorCritic, ValueHead, trunk_states
from rlhf.models.kernels import attention
from rlhf.models.kernels.attention import pack, packs, use_cpu_attention
from rlhf.models.kernels.recompute import recompute_activations
from rlhf.reward.scoring import score_tokens

# Three texts of 5, 3 and 4 tokens; 7 and 8 begin them all.
IDS = torch.tensor([[7, 8, 9, 5, 6], [7, 8, 9, 0, 0], [7, 8, 4, 3, 0]])
LENGTHS = torch.tensor([5, 3, 4])


def ragged():
    """Four texts with six tokens in common, of which one has no more, and two with eight: ids, lengths, mask."""
    ids = torch.randint(3, 60, (4, 20), generator=torch.Generator().manual_seed(1))
    ids[:, :6] = ids[0, :6]
    ids[3, :8] = ids[1, :8]
    lengths = torch.tensor([20, 9, 6, 14])
    return ids, lengths, torch.arange(20) < lengths.unsqueeze(1)


def test_places_by_hand():
    packed = pack(IDS, LENGTHS)
    assert packed.shared == 2
    assert packed.again.tolist() == [7]  # 9, which the first text has, too
    assert packed.place.tolist() == [0, 1, 2, 3, 4, 12, 13]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert packed.at.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0], [0, 1, 5, 6, 0]]
    assert packed.collect(IDS).tolist() == [7, 8, 9, 5, 6, 4, 3]


def test_two_pairs_by_hand():
    """Each pair's two texts begin alike; all begin with 1."""
    ids = torch.tensor([[1, 2, 3, 5], [1, 4, 6, 0], [1, 2, 3, 0], [1, 4, 6, 9]])
    packed = pack(ids, torch.tensor([4, 3, 3, 4]))
    assert packed.shared == 1
    assert packed.place.tolist() == [0, 1, 2, 3, 5, 6, 15]
    assert packed.at.tolist() == [[0, 1, 2, 3], [0, 4, 5, 0], [0, 1, 2, 0], [0, 4, 5, 6]]
    assert packed.again.tolist() == [9, 10, 13, 14]


@pytest.mark.parametrize(
    ("ids", "lengths", "shared"),
    [
        ([[7, 8, 9]], [3], 0),  # one text shares nothing
        ([[7, 8, 0], [7, 8, 0]], [2, 2], 2),  # padding is not shared, whatever its token
        ([[7, 8, 9], [7, 8, 0]], [3, 2], 2),
        ([[7, 8, 9], [7, 8, 9]], [3, 2], 2),
        ([[7, 8, 9], [6, 8, 9]], [3, 3], 0),
    ],
)
def test_what_is_shared(ids, lengths, shared):
    packed = pack(torch.tensor(ids), torch.tensor(lengths))
    assert packed.shared == shared
    assert len(packed.place) == sum(lengths) - shared * (len(ids) - 1)
    assert packed.collect(packed.spread(torch.arange(len(packed.place)))).tolist() == list(range(len(packed.place)))


def test_gradients_are_those_of_indexing():
    packed, generator = pack(IDS, LENGTHS), torch.Generator().manual_seed(0)
    real = torch.arange(5) < LENGTHS.unsqueeze(1)
    tokens = torch.randn(7, 2, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64) * real.unsqueeze(-1)
    (packed.spread(tokens) * weights).sum().backward()
    found, tokens.grad = tokens.grad, None
    (tokens[packed.at] * weights).sum().backward()
    assert_close(found, tokens.grad)
    padded = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    (packed.collect(padded) * weights).sum().backward()
    found, padded.grad = padded.grad, None
    (padded.flatten(0, 1)[packed.place] * weights).sum().backward()
    assert_close(found, padded.grad)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("kind", sorted(attention._KINDS))
def test_states_and_gradients_are_those_of_padded_texts(kind, checkpointing):
    (ids, lengths, mask), padded = ragged(), model_of(kind)
    model = copy.deepcopy(padded)
    use_cpu_attention(model)
    if checkpointing:
        for one in (padded, model):
            recompute_activations(one, checkpointing)
    seen = widths(model)
    expected, found = trunk_states(padded, ids), trunk_states(model, ids, lengths)
    assert seen == [(1, distinct(ids, lengths))]
    assert_close(found[mask], expected[mask], atol=1e-5, rtol=0)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)) * mask.unsqueeze(-1)
    for states in (expected, found):
        (states * weights).sum().backward()
    for one, other in zip(model.parameters(), padded.parameters(), strict=True):
        if other.grad is not None:
            assert_close(one.grad, other.grad, atol=1e-5 * float(other.grad.abs().max() + 1), rtol=0)


@pytest.mark.parametrize("options", [None, {}, {"use_reentrant": True}, {"preserve_rng_state": False}])
def test_layers_are_computed_again_with_the_options_given(monkeypatch, options):
    seen = []

    def checkpoint(function, *args, **given):
        seen.append(given)
        return function(*args)

    monkeypatch.setattr("rlhf.models.kernels.recompute.checkpoint", checkpoint)
    model = model_of("llama")
    recompute_activations(model, options)
    trunk_states(model, IDS)
    with torch.no_grad():
        trunk_states(model, IDS)
    assert seen == [{"use_reentrant": False, **(options or {})}] * model.config.num_hidden_layers


def test_in_bf16_as_near_to_float32_as_padded_texts():
    (ids, lengths, mask), model = ragged(), model_of("llama")
    exact = trunk_states(model, ids)[mask]
    use_cpu_attention(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        padded, found = (trunk_states(model, ids, given)[mask] for given in (None, lengths))
    assert (found - exact).abs().mean() < 1.2 * (padded - exact).abs().mean()


def test_a_window_that_the_texts_fit_in_and_one_that_they_do_not():
    (ids, lengths, mask), model = ragged(), model_of("mistral")
    model.config.sliding_window = 8
    expected = trunk_states(model, ids)[mask]
    use_cpu_attention(model)
    assert packs(model, 8)
    assert not packs(model, 9)
    seen = widths(model)
    assert_close(trunk_states(model, ids, lengths)[mask], expected, atol=1e-5, rtol=0)
    assert seen == [(4, 20)]
    assert trunk_states(model, ids[:2, :8], torch.tensor([8, 7])).shape == (2, 8, 32)
    assert seen[1:] == [(1, distinct(ids[:2, :8], torch.tensor([8, 7])))]


def test_only_on_a_cpu():
    model = model_of("llama")
    use_cpu_attention(model)
    assert packs(model, 8)
    assert not packs(model.to("meta"), 8)


class Own(LlamaModel):
    """A trunk of a user's, which passes on nothing that it does not know."""

    def forward(self, input_ids, **_):
        return super().forward(input_ids)


def test_a_trunk_that_is_not_transformers_own_gets_no_packed_texts():
    model = model_of("llama")
    model.model = Own(model.config)
    use_cpu_attention(model)
    assert not packs(model, 8)
    ids, lengths, mask = ragged()
    assert torch.equal(trunk_states(model, ids, lengths)[mask], trunk_states(model, ids)[mask])


def test_a_score_is_read_from_packed_texts():
    ids, lengths, mask = ragged()
    model = tiny.llama_reward().eval()
    expected = score_tokens(model, ids, mask)
    use_cpu_attention(model)
    seen = widths(model)
    assert_close(score_tokens(model, ids, mask), expected, atol=1e-5, rtol=0)
    assert seen == [(1, distinct(ids, lengths))]


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("lora", [False, True])
def test_log_probs_values_and_gradients_of_actor_and_critic(lora, critic):
    prompts, answers = torch.tensor([4, 2, 6, 1]), torch.tensor([3, 8, 1, 5])
    columns, steps = torch.arange(6), torch.arange(8)
    attention_mask = torch.cat([columns >= 6 - prompts.unsqueeze(1), steps < answers.unsqueeze(1)], 1)
    ids = torch.randint(3, 60, (4, 14), generator=torch.Generator().manual_seed(3))
    results = []
    for own in (False, True):
        policy, value = tiny.llama().train(), tiny.llama_reward(seed=1).train()
        for model in (policy, value) if own else ():
            use_cpu_attention(model)
        if lora:  # without dropout: it has other masks where tokens are shared
            config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            torch.manual_seed(4)
            policy, value = get_peft_model(policy, config), get_peft_model(value, config)
        head = ValueHead(32)
        torch.nn.init.ones_(head.score.weight)
        both = ActorCritic(policy, head if critic == "shared" else value, 0.7)
        assert both.packs(14) is own
        logp, entropy, values = both(ids, attention_mask, 8)
        real = attention_mask[:, 6:]
        (logp.sum() + (torch.where(real, values[:, :-1], 0) ** 2).sum()).backward()
        grads = [p.grad for p in both.parameters() if p.requires_grad and p.grad is not None]
        results.append([logp, entropy, torch.where(real, values[:, :-1], 0), *grads])
    assert len(results[0]) == len(results[1]) > 8
    for one, other in zip(*results, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-5)
