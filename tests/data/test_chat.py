"""One chat format in reward training, PPO and evaluation, token for token."""

import json

import pytest
import tiny
from chat_families import BARE, FAMILIES, GEMMA, LLAMA_2, PHI, family, user
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from rlhf.data.chat import (
    HH_TEMPLATE,
    decode_response,
    encode_prompt,
    encode_response,
    end_id,
    give_distinct_pad,
    prepare_tokenizer,
)
from rlhf.data.hh_rlhf import Pair, load_pairs
from rlhf.data.oasst import load_prompts
from rlhf.data.prompts import dataset_row
from rlhf.ppo.prompts import read_prompts
from rlhf.reward.trainer import encode_pair, encode_pairs

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
    chat.pad_token = chat.bos_token  # which begins texts
    assert (give_distinct_pad(chat), chat.pad_token) == (False, "<|endoftext|>")


@pytest.mark.parametrize(("template", "prompt", "response"), FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("text", ["Hi.", "What do <s>, </s>, <turn> and <end> do?", "an <end>", "end", "x"])
def test_a_finished_response_is_its_whole_text_and_one_token(template, prompt, response, text):
    """Control tokens that people quote stay text: only the template's own are control tokens."""
    tokenizer = family(template)
    ids, said = encode_prompt(tokenizer, user(text)), encode_response(tokenizer, user("a"), text)
    assert (tokenizer.decode(ids), tokenizer.decode(said)) == (prompt.format(text), response.format(text))
    control = range(1, 5)
    assert sum(i in control for i in ids) == sum(prompt.count(t) for t in ("<s>", "</s>", "<turn>", "<end>"))
    assert [i for i in said if i in control] == [end_id(tokenizer)] == said[-1:]


@pytest.mark.parametrize("template", [None, GEMMA, LLAMA_2, BARE])
@pytest.mark.parametrize("text", ["Hi there.", "Why </s>?"])
def test_no_blank_comes_before_a_response_that_the_whole_text_has_not(template, text):
    """SentencePiece's tokenizers begin every text with a blank: a policy samples none in the middle of one."""
    tokenizer = family(template, blank_first=True)
    ids, said = encode_prompt(tokenizer, user("A b")), encode_response(tokenizer, user("A b"), text)
    turns = [*user("A b"), {"role": "assistant", "content": text}]
    whole = tokenizer.apply_chat_template(turns, sanitize_control_tokens=True, return_dict=False)
    assert (ids + said)[:-1] == whole[: len(ids + said) - 1]
    plain = encode_response(tokenizer, "A b", " c")
    assert tokenizer.convert_ids_to_tokens(plain[:-1]) == ["\u2581", "c"]


def test_a_text_that_comes_with_its_end_has_one():
    tokenizer = family(GEMMA)
    plain = encode_response(tokenizer, "a text", " an <end> b")
    assert (tokenizer.decode(plain[:-1]), plain[-1], plain.count(4)) == (" an <end> b", 4, 1)
    assert encode_response(tokenizer, "a text", " an <end> b<end>") == plain
    assert encode_response(tokenizer, "a text", " an <end> b</s>") == plain


def test_what_a_template_writes_before_a_response_may_hold_control_tokens():
    channel = (
        "{% for m in messages %}{{ '<turn>' + m['role'] + ('<turn>final' if m['role'] == 'assistant' else '') + ': ' "
        "+ m['content'] + '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant' }}{% endif %}"
    )
    tokenizer = family(channel)
    ids = encode_response(tokenizer, user("a"), "b <end>")
    assert (tokenizer.decode(ids), ids.count(3), ids.count(4)) == ("<turn>final: b <end><end>", 1, 1)


def test_templates_that_change_a_response_get_its_bare_text():
    changes = PHI.replace("m['content']", "m['content'].split('|')[0]")
    tokenizer = family(changes)
    assert tokenizer.decode(encode_response(tokenizer, user("a"), "b|c")) == "b|c<end>"


@pytest.mark.parametrize("template", [GEMMA, PHI, LLAMA_2, BARE, None])
def test_tags_that_are_special_tokens_are_text_and_what_frames_turns_is_not(template):
    tokenizer = family(template, "<answer>", "</answer>")
    ids = tokenizer("<s><answer>4</answer><pad></s>", add_special_tokens=False)["input_ids"]
    frame = [3, 4] if template in (GEMMA, PHI) else []  # <turn> and <end>
    assert decode_response(tokenizer, [*ids, *frame]) == "<answer>4</answer>"
    refuses = family("{{ raise_exception('system first') }}", "<answer>", "</answer>")
    assert decode_response(refuses, ids) == "4"


def test_one_rule_for_bos_and_none_for_an_eos_that_tokenizers_append():
    tokenizer = tiny._byte_level(["<pad>", "<s>", "</s>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    marks = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    prepare_tokenizer(tokenizer)
    film = tokenizer("The film was", add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "The film was") == encode_prompt(tokenizer, "<s>The film was") == [1, *film]
    assert tokenizer.decode(encode_prompt(tokenizer, user("Hi."))) == "<s>\n\nHuman: Hi.\n\nAssistant:"
    assert tokenizer.decode(encode_response(tokenizer, user("Hi."), "Ho.")) == " Ho.</s>"
    row = encode_pair(tokenizer, Pair(user("Hi."), "Ho.", "No.", "x"))["chosen_ids"]
    assert (row.count(1), row[0], row.count(2), row[-1]) == (1, 1, 1, 2)


@pytest.mark.parametrize("name", ["gemma", "phi", "llama 2", "ours"])
def test_a_prompt_that_ends_in_an_assistants_turn_is_continued(name):
    template, start, end = FAMILIES[name]
    tokenizer = family(template)
    prompt = [*user("Name a sea."), {"role": "assistant", "content": "One is"}]
    begun = end.format("One is").removesuffix(" </s>").removesuffix("</s>").removesuffix("<end>")
    assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == start.format("Name a sea.") + begun
    rest = tokenizer.decode(encode_response(tokenizer, prompt, " the <end> one."))
    assert begun + rest == end.format("One is the <end> one.")


def test_a_template_that_prints_the_date_prints_the_same_one_on_every_day():
    """The day is the one that Llama 3's template has for want of a clock; it was a Friday."""
    tokenizer = family("{%- if strftime_now is defined %}{{ strftime_now('%d %b %Y|%Y-%m-%d|%B %-d, %A') }}{% endif %}")
    assert tokenizer.decode(encode_prompt(tokenizer, user("a"))) == "26 Jul 2024|2024-07-26|July 26, Friday"
    assert "macro" not in tokenizer.chat_template  # what is saved is the model's own


def test_arguments_of_the_template_reach_it():
    switch = (
        "{% if tools %}{{ tools[0]['name'] }}{% endif %}{{ messages[0]['content'] }}{% if think is false %}!{% endif %}"
    )
    tokenizer = family(switch)
    options = {"think": False, "tools": [{"name": "<end>"}]}
    ids = encode_prompt(tokenizer, user("a"), options)
    assert (tokenizer.decode(ids), ids.count(4)) == ("<end>a!", 0)


def test_pairs_that_are_the_same_tokens_are_counted_out():
    tokenizer = family(None)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    pairs = [
        Pair(user("q"), "Good", "good", "1"),
        Pair(user("q"), "good", "bad", "2"),
        Pair(user("q"), "a" * 99, "b", "3"),
    ]
    counts = {"too_long": 0, "identical_tokens": 0}
    kept, rows = encode_pairs(tokenizer, pairs, 50, None, counts)
    assert ([pair.source for pair in kept], len(rows), counts) == (["2"], 1, {"too_long": 1, "identical_tokens": 1})


def test_a_pairs_own_arguments_of_the_template_come_before_those_for_all(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [row, row | {"chat_template_kwargs": {"think": "no"}, "tools": '[{"name": "now"}]'}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    pairs, _ = load_pairs(str(tmp_path / "pairs.jsonl"))
    tokenizer = family(PHI + "{{ think }}{% for tool in tools or [] %}{{ tool.name }}{% endfor %}")
    prompts = [encode_pair(tokenizer, pair, {"think": "yes"})["chosen_ids"] for pair in pairs]
    start = "<turn>user\na<end>\n<turn>assistant\n"
    assert [tokenizer.decode(ids) for ids in prompts] == [f"{start}yesb<end>", f"{start}nonowb<end>"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "q", "x": 1, **rows[1]} | {"prompt": "q"}) + "\n")
    (prompt,), _ = load_prompts([str(tmp_path / "prompts.jsonl")])
    assert prompt.options == {"think": "no", "tools": [{"name": "now"}]}
    (read,) = read_prompts([dataset_row(prompt)], tokenizer)
    assert (read.options, read.columns) == (prompt.options, {"x": 1})
