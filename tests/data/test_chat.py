"""One chat format in reward training, PPO and evaluation, token for token."""

import pytest
import tiny
from transformers import AutoTokenizer

from rlhf.data.chat import HH_TEMPLATE, encode_prompt, encode_response, give_distinct_pad, prepare_tokenizer
from rlhf.data.hh_rlhf import load_pairs
from rlhf.ppo.prompts import read_prompts
from rlhf.reward.trainer import encode_pair

TOKENIZERS = [tiny.gpt2_tokenizer, tiny.chat_tokenizer]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_reward_training_ppo_and_evaluation_see_the_same_tokens(make):
    tokenizer = prepare_tokenizer(make())
    pairs, _ = load_pairs("demo:preferences.jsonl")
    for pair in pairs[:60]:
        row = encode_pair(tokenizer, pair)["chosen_ids"]
        (prompt,) = read_prompts([{"prompt": pair.prompt}], tokenizer, None)  # PPO
        response = encode_response(tokenizer, pair.prompt, pair.chosen)
        assert row == prompt.input_ids + response
        assert row.count(tokenizer.eos_token_id) == row[len(prompt.input_ids) :].count(tokenizer.eos_token_id) + (
            prompt.input_ids.count(tokenizer.eos_token_id)
        )
        assert row[-1] == tokenizer.eos_token_id
        assert response[:-1].count(tokenizer.eos_token_id) == 0
        if len(pair.prompt) == 1:  # evaluation
            assert encode_prompt(tokenizer, pair.prompt) == prompt.input_ids
        whole = tokenizer.apply_chat_template(
            [*pair.prompt, {"role": "assistant", "content": pair.chosen}], tokenize=False
        )
        assert whole.startswith(tokenizer.decode(row))
        assert whole[len(tokenizer.decode(row)) :].strip() == ""


def test_our_template_word_for_word():
    tokenizer = prepare_tokenizer(tiny.gpt2_tokenizer())
    dialogue = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "how are you?"},
    ]
    ids = encode_prompt(tokenizer, dialogue) + encode_response(tokenizer, dialogue, "fine")
    expected = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how are you?\n\nAssistant: fine<|endoftext|>"
    assert tokenizer.decode(ids) == expected


def test_the_template_is_saved_with_the_tokenizer(tmp_path):
    prepare_tokenizer(tiny.gpt2_tokenizer()).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == HH_TEMPLATE


def test_a_distinct_pad_for_reward_models():
    chat, plain = prepare_tokenizer(tiny.chat_tokenizer()), prepare_tokenizer(tiny.gpt2_tokenizer())
    assert (chat.pad_token, give_distinct_pad(chat), chat.pad_token) == ("<|im_end|>", False, "<|endoftext|>")
    assert (plain.pad_token, give_distinct_pad(plain), plain.pad_token) == ("<|endoftext|>", True, "<|pad|>")
    assert len(plain) == 401
