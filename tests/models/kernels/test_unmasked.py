"""Passes without a mask and decoding in place say what transformers' own way says, for each kind that goes by them."""

import pytest
import torch
from test_attention import model_of
from torch.testing import assert_close

from rlhf.generation.decode import generate, inverse_cdf, uniforms
from rlhf.generation.static import StaticDecoder
from rlhf.models.kernels.recompute import recompute_activations
from rlhf.models.kernels.unmasked import PLAIN_KINDS, is_plain, unmasked, without_looks
from rlhf.models.sampling_copy import SamplingCopy, can_copy

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", sorted(PLAIN_KINDS))
def test_states_and_gradients_are_those_of_transformers_own_way(kind, checkpointing):
    model = model_of(kind)
    assert is_plain(model)
    if checkpointing:
        recompute_activations(model, None)
    ids = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(2))
    found = []
    for arguments in ({"input_ids": ids}, without_looks(model, ids)):
        states = model.base_model(**arguments, use_cache=False).last_hidden_state
        model.zero_grad()
        (states * weights).sum().backward()
        found.append([states, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 5
    for one, other in zip(*found, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(PLAIN_KINDS))
def test_tokens_are_those_of_a_cache_that_grows(kind):
    model = model_of(kind).eval()
    u = uniforms(0, 1, list("abcd"), 20)
    expected = generate(model, PROMPTS, u, [1, 33, 50], 1.0)
    assert can_copy(model)
    twin = SamplingCopy(model, None)
    twin.refresh()
    with torch.no_grad():
        rows, _ = StaticDecoder().decode(twin.model, PROMPTS, u, [1, 33, 50], 1.0, inverse_cdf)
    assert [row[: len(own)] for row, own in zip(rows, expected, strict=True)] == expected


def test_on_a_cpu_models_are_called_as_ever():
    ids = torch.tensor([[5, 6]])
    assert unmasked(model_of("llama"), ids).keys() == {"input_ids"}


def test_a_window_and_layers_of_other_kinds_are_not_plain():
    model = model_of("qwen2")
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert not is_plain(model)
    assert not can_copy(model)
