"""FLOPs and bytes by hand, and as PyTorch counts them."""

import pytest
import tiny
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf.generation.decode import generate, uniforms
from rlhf.models.lora import add_lora
from rlhf.perf.work import Flops, head_width, key_values

LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])


def test_gpt2_medium_by_hand():
    with torch.device("meta"):
        flops = Flops.of(GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)))
    assert flops.matrices == flops.trained == 24 * 12 * 1024**2  # c_attn 3, c_proj 1, the MLP's two 4 each
    assert flops.head == 50257 * 1024
    assert flops.key_values == 2 * 24 * 1024
    # 64 texts of 256 + 128 tokens, logits of the responses: 16.2 TFLOP.
    blocks, head = 2 * 24 * 12 * 1024**2 * 64 * 384, 2 * 50257 * 1024 * 64 * 128
    attention = 24 * 64 * 2 * 2 * 1024 * 384 * 384 / 2
    assert flops.forward([384] * 64, 64 * 128) == blocks + head + attention == pytest.approx(16.2e12, rel=0.01)
    assert flops.training([384] * 64, 64 * 128) == 3 * (blocks + head + attention)


def test_a_beginning_in_common_counts_once():
    flops = Flops.of(tiny.llama())
    # Texts of 5, 4 and 3 tokens, of which 2 begin all: 8 tokens, and squares of 25, 16 - 4 and 9 - 4.
    assert flops.forward([5, 4, 3], 6, [2, 2]) == 2 * (flops.matrices * 8 + flops.head * 6) + flops.attention * 42
    assert flops.training([5, 4, 3], 6, [2, 2]) == 3 * flops.forward([5, 4, 3], 6, [2, 2])


def test_grouped_query_attention_by_hand():
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    )
    with torch.device("meta"):
        flops = Flops.of(LlamaForCausalLM(config))
    assert flops.matrices == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert flops.head == 49152 * 576
    assert flops.attention == 30 * 2 * 2 * 9 * 64 / 2
    assert flops.key_values == 2 * 30 * 192


def test_adapters_count_where_they_are_on_and_frozen_weights_have_no_gradient():
    base = Flops.of(tiny.llama())
    model = add_lora(tiny.llama(), LORA)
    on = Flops.of(model)
    # Rank 2, two layers: q_proj 32 -> 32, v_proj 32 -> 16.
    assert (on.trained, on.frozen) == (2 * (2 * 64 + 2 * 48), base.matrices)
    lengths = [7, 4]
    assert on.training(lengths, 5) == (
        2 * (3 * on.trained + 2 * on.frozen) * 11 + 3 * on.attention * (49 + 16) + 2 * 2 * on.head * 5
    )
    with model.disable_adapter():
        assert Flops.of(model).forward(lengths) == base.forward(lengths)
    model.add_adapter("reference", LORA)
    assert Flops.of(model).matrices == on.matrices


def test_gpt2s_split_attention_is_as_large_as_the_fused_one():
    assert Flops.of(add_lora(tiny.gpt2(), LORA)).frozen == Flops.of(tiny.gpt2()).matrices


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_a_pass_as_pytorch_counts_it(make):
    model, ids = make(), torch.full((3, 40), 7)
    model.set_attn_implementation("eager")  # its products are counted, the whole square of them
    flops = Flops.of(model)
    whole_square = flops.attention * 3 * 40**2
    with FlopCounterMode(display=False) as counter:
        logits = model(ids).logits
    assert counter.get_total_flops() == pytest.approx(flops.forward([40] * 3, 3 * 40) + whole_square, rel=0.01)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    both = counter.get_total_flops() + backward.get_total_flops()
    assert both == pytest.approx(flops.training([40] * 3, 3 * 40) + 3 * whole_square, rel=0.03)


def test_a_pass_under_frozen_weights_as_pytorch_counts_it():
    model, ids = add_lora(tiny.llama(), LORA), torch.full((3, 40), 7)
    model.set_attn_implementation("eager")
    flops = Flops.of(model)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    # Nothing that is trained lies below the first layer's projections, which need no gradient of their inputs.
    first = 2 * 32 * (32 + 16 + 16) * 120
    expected = flops.training([40] * 3, 3 * 40) + 3 * flops.attention * 3 * 40**2 - first
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_decoding_as_pytorch_counts_it(make):
    model, prompts = make(), [[5, 6, 7], [8, 9, 10]]
    model.set_attn_implementation("eager")
    flops = Flops.of(model)
    with FlopCounterMode(display=False) as counter:
        responses = generate(model, prompts, uniforms(0, 1, ["a", "b"], 9), [399], 1.0)
    assert [len(row) for row in responses] == [9, 9]
    expected = flops.forward([3, 3], 2) + flops.attention * 2 * 3**2 + flops.decoding([3, 3], [9, 9])
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_decoded_bytes_by_hand():
    flops = Flops.of(tiny.llama())
    weights = 4 * (flops.matrices + flops.head)
    # Three tokens of the first response are fed, after a prompt of 5: they see 6, 7 and 8 tokens. The second has one.
    assert flops.decoded_bytes([5, 2], [4, 1], 4) == 3 * weights + (6 + 7 + 8) * 2 * 2 * 16 * 4
    assert flops.decoded_bytes([5, 2], [4, 1], 2) == flops.decoded_bytes([5, 2], [4, 1], 4) / 2


def test_weights_that_are_stored_in_fewer_bytes_move_as_they_are():
    """100 numbers of one byte and 50 of four, computed in two: 200 bytes a step, of which the longer one has three."""
    flops = Flops(0, 0, 0, 0, head_trained=False, key_values=0, layers=((100, 1), (50, 4)))
    assert flops.decoded_bytes([3, 9], [4, 2], 2) == 3 * (100 * 1 + 50 * 2)


def test_a_heads_width_is_the_one_that_is_set():
    """As in Qwen3 and Gemma, whose heads together are wider than the model."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    assert head_width(LlamaConfig(**sizes, head_dim=32)) == 32
    assert key_values(LlamaConfig(**sizes, head_dim=32)) == 2 * 3 * 2 * 32
    assert head_width(LlamaConfig(**sizes)) == 16
    assert key_values(GPT2Config(n_embd=64, n_head=4, n_layer=3)) == 2 * 3 * 64


def test_merged_adapters_are_in_the_weights_which_move_as_they_are_stored():
    base, model = Flops.of(tiny.llama()), add_lora(tiny.llama(), LORA)
    model.merge_adapter()
    assert Flops.of(model).matrices == base.matrices
    half = Flops.of(tiny.llama().bfloat16()).layers
    assert half == tuple((count, 2) for count, size in base.layers)
    assert {size for _, size in base.layers} == {4}
