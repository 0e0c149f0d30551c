"""A reward model's own forward pass over texts without padding gives the logits and gradients of padded ones."""

import copy

import pytest
import tiny
import torch
from obvious import distinct, widths
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import DynamicCache

from rlhf.functional.batching import right_pad
from rlhf.models.kernels.attention import use_cpu_attention
from rlhf.models.unwrap import unwrap_peft
from rlhf.reward.packed import packed_passes
from rlhf.reward.scoring import score_pairs, score_rows

# Two pairs: each pair's texts begin alike, and all with 5 and 6. The lengths differ within a pair and between pairs.
CHOSEN = [[5, 6, 7, 8, 20, 21, 22, 3], [5, 6, 9, 30, 3]]
REJECTED = [[5, 6, 7, 8, 23, 3], [5, 6, 9, 31, 32, 33, 3]]


def batch(pad=0):
    ids, mask = right_pad([*CHOSEN, *REJECTED], pad)
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("make", [tiny.gpt2_reward, tiny.llama_reward])
def test_logits_and_gradients_are_those_of_padded_texts(make, lora):
    padded = make().eval()
    given = batch(padded.config.pad_token_id)
    if lora:
        torch.manual_seed(0)
        names = ["c_attn"] if make is tiny.gpt2_reward else ["q_proj", "v_proj"]
        config = LoraConfig(target_modules=names, init_lora_weights=False, task_type="SEQ_CLS")
        padded = get_peft_model(padded, config).eval()
    packed = copy.deepcopy(padded)
    use_cpu_attention(unwrap_peft(packed))
    seen = widths(unwrap_peft(packed))
    with packed_passes(packed):
        found = packed(**given).logits
    assert seen == [tuple(given["input_ids"].shape)]  # what the hook before this package's saw
    expected = padded(**given).logits
    assert_close(found, expected, atol=1e-5, rtol=0)
    for logits in (found, expected):
        (logits.squeeze(-1) * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum().backward()
    compared = 0
    for one, other in zip(packed.parameters(), padded.parameters(), strict=True):
        if other.grad is not None:
            assert_close(one.grad, other.grad, atol=1e-5 * float(other.grad.abs().max() + 1), rtol=0)
            compared += 1
    assert compared > 3


def computed(model, given, **more):
    """Rows and columns that the trunk gets inside."""
    with packed_passes(model):
        seen = widths(model)
        model(**given, **more)
    return seen


def test_only_distinct_beginnings_are_computed():
    model, given = tiny.llama_reward().eval(), batch()
    use_cpu_attention(model)
    n = distinct(given["input_ids"], given["attention_mask"].sum(1))
    assert n == 2 + (2 + 4 + 2) + (1 + 2 + 4)
    assert computed(model, given) == [(1, n)]
    whole = tuple(given["input_ids"].shape)
    assert computed(model, given, output_hidden_states=True) == [whole]
    assert computed(model, given, use_cache=True) == [whole]
    assert computed(model, given, output_attentions=True) == [whole]
    assert computed(model, given, past_key_values=DynamicCache()) == [whole]
    assert computed(model, given, position_ids=torch.arange(whole[1]).expand(whole)) == [whole]
    flipped = {name: tensor.flip(1) for name, tensor in given.items()}
    assert computed(model, flipped) == [whole]  # padded on the left
    assert computed(model, {"input_ids": given["input_ids"]}) == [whole]  # without a mask
    for place in ((1, 2), (1, 0)):
        given["attention_mask"][place] = 0
        assert computed(model, given) == [whole]  # a hole


def test_outside_nothing_is_packed():
    model, given = tiny.llama_reward().eval(), batch()
    use_cpu_attention(model)
    with pytest.raises(ZeroDivisionError), packed_passes(model):
        raise ZeroDivisionError
    seen = widths(model)
    model(**given)
    assert seen == [tuple(given["input_ids"].shape)]


def test_a_model_that_packs_nothing_goes_through_as_it_is():
    model, given = tiny.llama_reward().eval(), batch()
    assert computed(model, given) == [tuple(given["input_ids"].shape)]


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_scores_of_pairs_are_those_of_their_rows(packs, batch_size):
    model = tiny.llama_reward().eval()
    expected = torch.stack([score_rows(model, rows, 1) for rows in (CHOSEN, REJECTED)])
    if packs:
        use_cpu_attention(model)
    seen = widths(model)
    assert_close(score_pairs(model, CHOSEN, REJECTED, batch_size), expected, atol=1e-5, rtol=0)
    if packs and batch_size == 1:  # both texts of a pair, and their prompt once
        assert sorted(seen) == [(1, 3 + 2 + 4), (1, 4 + 4 + 2)]
    assert score_pairs(model, [], [], 2).shape == (2, 0)


def test_a_pair_of_which_one_text_is_longer_than_the_window_is_padded():
    model = tiny.llama_reward().eval()
    use_cpu_attention(model)
    model.config.sliding_window = 7  # texts of 8 and 6, and of 5 and 7 tokens
    seen = widths(model)
    score_pairs(model, CHOSEN, REJECTED, 4)
    assert all(rows > 1 for rows, _ in seen)
    seen.clear()
    score_pairs(model, CHOSEN[1:], REJECTED[1:], 4)
    assert seen == [(1, 3 + 2 + 4)]
