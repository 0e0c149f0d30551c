"""Decoding: in a batch as alone, as the slow way, and with nothing of the model's own sampling settings."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch

from rlhf.generation import decode as module
from rlhf.generation.decode import _Layer, decode, generate, in_whole_numbers, inverse_cdf, uniforms
from rlhf.models.kernels.attention import use_cpu_attention

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]


def slowly(model, prompt, u, eos_ids, temperature):
    """One row, no cache, no padding: the whole sequence anew for every token."""
    row = list(prompt)
    for quantile in u.tolist():
        with torch.no_grad():
            probabilities = (model(torch.tensor([row])).logits[0, -1] / temperature).softmax(-1)
        token = int((probabilities.cumsum(0) <= quantile * probabilities.sum()).sum())
        row.append(token)
        if token in eos_ids:
            break
    return row[len(prompt) :]


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama, tiny.mamba, tiny.lfm2, tiny.mixtral])
def test_a_ragged_batch_says_what_each_row_says_alone(make):
    model = make()
    u = uniforms(0, 1, list("abcd"), 20)
    # A quarter of the vocabulary ends a response, so that rows leave the batch at different times.
    eos_ids = list(range(0, 400, 16))
    together = generate(model, PROMPTS, u, eos_ids, 0.9)
    assert together == [slowly(model, p, row, set(eos_ids), 0.9) for p, row in zip(PROMPTS, u, strict=True)]
    assert len({len(row) for row in together}) > 1
    for row in together:
        assert len(row) <= 20
        assert all(token not in eos_ids for token in row[:-1])


def test_the_models_own_sampling_settings_play_no_part():
    model, u = tiny.llama(), uniforms(0, 1, list("abcd"), 8)
    before = generate(model, PROMPTS, u, [2], 1.0)
    model.generation_config.repetition_penalty, model.generation_config.top_k = 5.0, 1
    assert generate(model, PROMPTS, u, [2], 1.0) == before


def test_a_stream_depends_on_seed_step_and_prompt_only():
    whole = uniforms(3, 7, ["a", "b", "c"], 5)
    assert torch.equal(uniforms(3, 7, ["c", "a"], 5), whole[[2, 0]])
    for other in (uniforms(4, 7, ["a"], 5), uniforms(3, 8, ["a"], 5), uniforms(3, 7, ["x"], 5)):
        assert not torch.equal(other[0], whole[0])
    assert len(uniforms(3, 7, list(map(str, range(1000))), 2).unique(dim=0)) == 1000


def test_inverse_cdf_by_hand():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(6, 4)  # token 1 has probability 0
    u = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.9999999])
    assert inverse_cdf(logits, u, 1.0).tolist() == [0, 0, 2, 2, 3, 3]


def test_whole_numbers_say_what_floats_say():
    logits = torch.randn(200, 5000, generator=torch.Generator().manual_seed(0))
    u = torch.rand(200, generator=torch.Generator().manual_seed(1))
    cumulative, target = in_whole_numbers(logits.softmax(-1), u)
    exact = logits.double().softmax(-1).cumsum(-1)
    found = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    # A quantile within the rounding of a float32 softmax of a token's edge may fall on either side of it.
    below = torch.cat([torch.zeros(200, 1), exact], 1).gather(1, found.unsqueeze(1)).squeeze(1)
    above = exact.gather(1, found.unsqueeze(1)).squeeze(1)
    assert ((below - 1e-6 <= u) & (u <= above + 1e-6)).all()
    assert (found == torch.searchsorted(exact, u.double().unsqueeze(1), right=True).squeeze(1)).float().mean() > 0.99


def test_whole_numbers_by_hand():
    probabilities = torch.tensor([0.25, 0.0, 0.5, 0.25]).expand(5, 4)
    u = torch.tensor([0.0, 0.2499999, 0.25, 0.75, 0.9999999])
    cumulative, target = in_whole_numbers(probabilities, u)
    assert cumulative[0].tolist() == [2**38, 2**38, 3 * 2**38, 2**40]
    assert torch.searchsorted(cumulative, target, right=True).squeeze(1).tolist() == [0, 0, 2, 3, 3]


def test_inverse_cdf_frequencies_are_the_probabilities():
    logits = torch.tensor([1.0, -0.5, 0.3])
    u = (torch.arange(3000) + 0.5) / 3000
    counts = inverse_cdf(logits.expand(3000, 3), u, 0.7).bincount(minlength=3) / 3000
    torch.testing.assert_close(counts, (logits / 0.7).softmax(0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_no_quantile_takes_a_token_of_probability_0(u):
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    expected = 1 if u < 0.5 else 3
    assert inverse_cdf(logits, torch.tensor([u]), 1.0).tolist() == [expected]
    cumulative, target = in_whole_numbers(logits.softmax(-1), torch.tensor([u]))
    assert torch.searchsorted(cumulative, target, right=True).tolist() == [[expected]]


def test_a_cache_that_is_too_small_grows_with_what_is_in_it():
    states = torch.arange(24.0).view(1, 2, 4, 3)
    layer = _Layer(2)
    for start, end in ((0, 1), (1, 2), (2, 4)):  # fits, fills it, is more than its room
        keys, values = layer.update(states[:, :, start:end], -states[:, :, start:end])
        assert torch.equal(keys, states[:, :, :end])
        assert torch.equal(values, -states[:, :, :end])


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_logits_of_16_bits_are_sampled_from_in_32(temperature):
    """Probabilities of 16 bits would be rounded by up to 0.4 per cent, and their sum over a vocabulary far more."""
    logits = torch.randn(500, 2000, generator=torch.Generator().manual_seed(0)).bfloat16()
    u = torch.rand(500, generator=torch.Generator().manual_seed(1))
    assert torch.equal(inverse_cdf(logits, u, temperature), inverse_cdf(logits.float(), u, temperature))


def test_the_last_quantile_is_of_what_the_probabilities_sum_up_to():
    """A float32 sum that misses 1: beyond it lie tokens of probability 0."""
    logits = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    logits[:, -96:] = -1e4
    last = 1 - 2**-24
    assert (logits.softmax(-1).cumsum(-1)[:, -1] < last).any()
    assert (inverse_cdf(logits, torch.full((64,), last), 1.0) < 4000).all()


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_prompts_are_read_without_padding_and_their_beginnings_once(make):
    model = make().eval()
    prompts = [[5, 6, 7], [5, 6, 8, 9, 10, 11], [12], [5, 6, 8, 9]]
    u = uniforms(3, 1, ["a", "b", "c", "d"], 6)
    padded = decode(model, prompts, u, [2], 1.0)
    use_cpu_attention(model)
    found = decode(model, prompts, u, [2], 1.0)
    assert found.responses == padded.responses
    # 5 6 7, then 8 9 10 11, then 12; the last prompt is a beginning of the second.
    assert found.calls[0] == (1, 3 + 4 + 1)
    assert padded.calls[0] == (4, 6)
    assert found.calls[1:] == padded.calls[1:]


def test_a_row_that_has_ended_leaves_once_three_quarters_are_left():
    """Of four rows one ends after each of the first two tokens; the quantiles are the tokens here."""
    tokens = torch.tensor([[2.0, 9, 9, 9], [7, 8, 9, 10], [7, 2, 9, 9], [7, 8, 9, 2]])
    found = decode(
        tiny.llama(), [[5, 6]] * 4, tokens, [2], 1.0, sampler=lambda logits, numbers, temperature: numbers.long()
    )
    assert found.responses == [[2], [7, 8, 9, 10], [7, 2], [7, 8, 9, 2]]
    assert found.calls == [(4, 2), (3, 1), (2, 1), (2, 1)]


def test_keys_and_values_are_kept_as_attention_computes_them():
    layer = _Layer(5)
    states = torch.tensor([[[[1.0, 1 + 2**-12]]]])
    with torch.autocast("cpu", torch.bfloat16):
        keys, values = layer.update(states, states)
        again, _ = layer.update(states, states)
    assert keys.dtype == values.dtype == again.dtype == torch.bfloat16
    assert keys.tolist() == [[[[1.0, 1.0]]]]
    keys, _ = _Layer(5).update(states, states)
    assert torch.equal(keys, states)


def test_elsewhere_a_decoder_of_fixed_shapes_answers_up_to_each_end(monkeypatch):
    """Texts of at most 3 + 4 tokens. What is never sampled has no quantile there either."""
    asked, given = [], []
    monkeypatch.setattr(module, "is_static", lambda model, longest: asked.append(longest) or True)
    model = SimpleNamespace(device=torch.device("cuda"))

    def answer(*args):
        given.append(args[:5])
        assert args[5](torch.zeros(1, 3), torch.tensor([0.99]), 1.0).tolist() == [1]
        return [[5, 2, 7, 2], [5, 6, 7, 8]], [(2, 3), (2, 1)]

    u = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    decoder, never = SimpleNamespace(decode=answer), torch.tensor([2])
    found = decode(model, [[1, 2, 3], [4]], u, [2, 9], 0.7, decoder, never)
    assert found == ([[5, 2], [5, 6, 7, 8]], [(2, 3), (2, 1)])
    assert (asked, given) == ([7], [(model, [[1, 2, 3], [4]], u, [2, 9], 0.7)])
