"""What a config says of a model."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import Llama4ForCausalLM, Llama4TextConfig, Phi3Config, Phi3ForCausalLM

from rlhf.models.actor_critic import trunk_of
from rlhf.models.unwrap import max_positions


def test_longrope_has_its_original_positions():
    """Beyond them, one long text changes the log-probs of the others in its pass."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Phi3Config(
        vocab_size=64,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=rope | {"original_max_position_embeddings": 16},
        pad_token_id=0,
        initializer_range=0.2,
        **sizes,
    )
    assert max_positions(config) == 16
    model, text = Phi3ForCausalLM(config).eval(), torch.arange(3, 13)
    with torch.no_grad():
        alone, at_most, beyond = (
            model(torch.nn.functional.pad(text, (0, n - 10)).unsqueeze(0)).logits[0, :10] for n in (10, 16, 17)
        )
    assert_close(at_most, alone)
    assert not torch.allclose(beyond, alone, atol=1e-2)


LONG = {"rope_type": "longrope", "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("own", "text", "positions"),
    [
        ({"max_position_embeddings": 64}, {}, 64),
        ({}, {"max_position_embeddings": 32}, 32),
        ({"max_position_embeddings": 64}, {"max_position_embeddings": 32}, 64),
        ({}, {}, None),
        ({"max_position_embeddings": -1}, {}, None),
        ({"max_position_embeddings": 64}, {"rope_parameters": {"rope_type": "default"}}, 64),
        ({"max_position_embeddings": 64}, {"rope_parameters": LONG}, 16),
        ({"max_position_embeddings": 12}, {"rope_parameters": LONG}, 12),
        ({"max_position_embeddings": 64}, {"rope_parameters": {"full": {"rope_type": "default"}, "far": LONG}}, 16),
        ({"max_position_embeddings": 64, "position_biased_input": False}, {}, None),
        ({"max_position_embeddings": 64, "position_biased_input": True}, {}, 64),
    ],
)
def test_positions_by_hand(own, text, positions):
    assert max_positions(SimpleNamespace(get_text_config=lambda: SimpleNamespace(**text), **own)) == positions


def test_a_trunk_that_its_prefix_does_not_name():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    model = Llama4ForCausalLM(Llama4TextConfig(vocab_size=64, pad_token_id=0, **sizes, **heads))
    assert trunk_of(model) is model.model
    assert trunk_of(trunk_of(model)) is model.model
