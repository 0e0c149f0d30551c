"""Rows become prompts; what is too long, spread out or empty is answered as asked for."""

from itertools import chain

import pytest
import tiny
import torch
from tiny_ppo import trainer

from rlhf.data.chat import encode_response, prepare_tokenizer
from rlhf.errors import UserError
from rlhf.ppo.prompts import as_row, batches, read_prompts, response_ids

LONG = [{"prompt": "a"}, {"prompt": "a b c d e f g h i j"}, {"prompt": "b"}]


def tokenizer():
    return prepare_tokenizer(tiny.chat_tokenizer())


def test_long_prompts_are_refused_dropped_or_cut_at_the_front():
    with pytest.raises(UserError, match="train_dataset row 1: expected 1 to 5 tokens, found 1"):
        read_prompts(LONG, tokenizer(), 5)
    assert [p.prompt_id for p in read_prompts(LONG, tokenizer(), 5, "drop")] == ["0", "2"]
    whole = read_prompts(LONG, tokenizer())[1].input_ids
    assert read_prompts(LONG, tokenizer(), 5, "truncate")[1].input_ids == whole[-5:]
    assert read_prompts(LONG, tokenizer(), len(whole))[1].input_ids == whole  # as many as the limit
    for long_prompts in ("drop", "truncate"):
        with pytest.raises(UserError, match="train_dataset row 0: expected 1 to 5 tokens, found 0"):
            read_prompts([{"prompt": ""}, *LONG], tokenizer(), 5, long_prompts)


def test_prompt_and_response_have_to_fit_the_models_positions(tmp_path):
    rows = [{"prompt": "word " * 300}]
    with pytest.raises(UserError, match="expected prompts of at most 250 tokens, so that response_length=6 more fit"):
        trainer(tmp_path, rows=rows)
    trainer(tmp_path, rows=rows, max_prompt_tokens=250, long_prompts="truncate")


def short(model, positions=20):
    model.config.max_position_embeddings = positions
    return model


def score(completions, **columns):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("role", "given", "options"),
    [
        ("reference", lambda: {"ref_model": short(tiny.llama(3))}, {}),
        ("critic", lambda: {"reward_model": score, "value_model": short(tiny.llama_reward())}, {}),
        ("critic", lambda: {"reward_model": short(tiny.llama_reward())}, {}),  # its weights are the critic's, too
        ("reward reward", lambda: {"reward_model": short(tiny.llama_reward())}, {"critic": "shared"}),
        (
            "reward reward_1",
            lambda: {"reward_model": [tiny.llama_reward(), short(tiny.llama_reward(5)), score]},
            {},
        ),
        (
            "reward reward",
            lambda: {"reward_model": short(tiny.gpt2_reward()), "reward_processing_classes": tiny.gpt2_tokenizer()},
            {},
        ),
    ],
)
def test_every_role_needs_positions_for_prompt_and_response(tmp_path, role, given, options):
    words = (
        rf"^train_dataset: expected prompts of at most 14 tokens, so that response_length=6 more fit the {role}'s 20 "
    )
    with pytest.raises(UserError, match=words):
        trainer(tmp_path, given=given(), rows=[{"prompt": "of cities " * 10}], **options)
    trainer(tmp_path / "fits", given=given(), rows=[{"prompt": "of"}], **options)


def test_a_reward_that_appends_eos_needs_a_position_for_it(tmp_path):
    given = {"reward_model": short(tiny.llama_reward()), "value_model": tiny.llama_reward(7)}
    rows = [{"input_ids": [5] * 14}]
    trainer(tmp_path, given=given, rows=rows)
    with pytest.raises(UserError, match=r"expected prompts of at most 14 tokens, .*, found one of 15"):
        trainer(tmp_path, given=given, rows=rows, close_truncated=True)


def test_a_model_spread_over_devices_is_refused(tmp_path):
    policy = tiny.llama()
    policy.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(UserError, match="model: expected a model on one device, found it on cpu, disk"):
        trainer(tmp_path, given={"model": policy})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "expected column 'prompt', 'messages' or 'input_ids', found .'text'."),
        ({"prompt": ""}, "expected 1 or more tokens, found 0"),
        ({"prompt": 5}, "expected text or messages with a role, found int"),
        ({"prompt": [{"content": "a"}]}, "expected text or messages with a role, found list"),
        ({"messages": [{"content": "a"}]}, "expected text or messages with a role, found list"),
        ({"messages": ["a"]}, "expected text or messages with a role, found list"),
        ({"messages": None}, "expected text or messages with a role, found NoneType"),
        ({"messages": [{"role": "user"}]}, "expected messages with content, found .'role'."),
        ({"input_ids": "a b"}, "expected token ids in input_ids, found str 'a b'"),
        ({"input_ids": None}, "expected token ids in input_ids, found NoneType None"),
        ({"input_ids": [5, 400]}, "expected ids of the tokenizer's 400 tokens, found 400"),
        ({"input_ids": [-100, 5]}, "expected ids of the tokenizer's 400 tokens, found -100"),
        ({"prompt": "a \ud83d"}, r"expected Unicode text, found the lone surrogate .ud83d"),
        ({"prompt": [{"role": "user", "content": "\ud83d"}]}, r"expected Unicode text, found the lone surrogate"),
        ("a", "expected columns with values, found str"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(row, words):
    with pytest.raises(UserError, match=f"train_dataset row 0: {words}"):
        read_prompts([row], tokenizer())


def test_a_token_that_the_model_has_no_embedding_for_is_named(tmp_path):
    given = {"processing_class": tokenizer()}
    given["processing_class"].add_tokens(["<x>"])
    words = "expected token ids below 400, the number of the model's embeddings, found 400"
    with pytest.raises(UserError, match=f"^train_dataset: {words}"):
        trainer(tmp_path, rows=[{"prompt": "a <x>"}], given=given)
    run = trainer(tmp_path, given=given)
    with pytest.raises(UserError, match=f"^prompts: {words}"):
        run.generate(["<x>"])
    with pytest.raises(UserError, match=f"^responses: {words}"):
        run.step(["a"], ["<x>"], [1.0])


def test_messages_that_are_a_text_are_one():
    (prompt,) = read_prompts([{"messages": "a b"}], tokenizer())
    assert (prompt.content, prompt.input_ids) == ("a b", tokenizer()("a b")["input_ids"])


def test_what_a_chat_template_refuses_is_answered_in_its_words():
    strict = tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"train_dataset row 0: .*: roles must alternate"):
        read_prompts([{"prompt": [{"role": "user", "content": "a"}]}], strict)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(UserError, match=r"resume_from_checkpoint .*nowhere: .*found no such folder"):
        run.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"resume_from_checkpoint .*: .*found no manifest\.json"):
        run.train(resume_from_checkpoint=tmp_path)


def test_columns_stay_and_ids_are_the_rows_own():
    (prompt,) = read_prompts([{"prompt": "a", "prompt_id": 7, "answer": 42}], tokenizer())
    assert (prompt.prompt_id, prompt.columns, prompt.text) == ("7", {"answer": 42}, "a")
    rows = [{"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]}, {"input_ids": [0, 5]}]
    first, second = read_prompts(rows, tokenizer())
    assert (first.prompt_id, first.input_ids, first.columns) == ("0", [5, 6], {})  # without its padding
    assert (second.prompt_id, second.input_ids) == ("1", [0, 5])


def test_bare_prompts_become_rows():
    assert as_row("a", "x") == {"prompt_id": "x", "prompt": "a"}
    assert as_row(torch.tensor([1, 2]), "x") == {"prompt_id": "x", "input_ids": [1, 2]}
    assert as_row([{"role": "user", "content": "a"}], "x")["prompt"][0]["content"] == "a"
    assert as_row({"prompt": "a", "prompt_id": "own"}, "x") == {"prompt": "a", "prompt_id": "own"}
    assert as_row({"prompt": "a", "k": 1}, "x") == {"prompt": "a", "k": 1, "prompt_id": "x"}


def test_each_epoch_has_its_own_order_and_every_prompt_once():
    prompts = read_prompts([{"prompt": str(i)} for i in range(10)], tokenizer())
    seen = [[p.prompt_id for p in batch] for batch in batches(prompts, 4, 3, 6)]
    assert [len(batch) for batch in seen] == [4, 4, 2, 4, 4, 2]
    first, second = list(chain(*seen[:3])), list(chain(*seen[3:]))
    assert sorted(first) == sorted(second) == [str(i) for i in range(10)]
    assert first != second
    assert [[p.prompt_id for p in b] for b in batches(prompts, 4, 3, 6)] == seen


SWITCH = (
    "{% for t in tools or [] %}{{ t.name }}{% endfor %}"
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    "{% if think is defined %}{{ ' think ' + think | string }}{% endif %}"
)


def test_arguments_of_the_template_come_from_the_row_before_the_config(tmp_path):
    tokenizer, hi = prepare_tokenizer(tiny.chat_tokenizer()), [{"role": "user", "content": "hi"}]
    tokenizer.chat_template = SWITCH
    rows = [
        {"prompt": hi, "topic": "a"},
        {"prompt": hi, "chat_template_kwargs": {"think": True, "x": None}, "tools": '[{"name": "now"}]', "topic": "b"},
        {"prompt": hi, "chat_template_kwargs": None, "tools": [], "topic": "c"},
    ]
    given = {"processing_class": tokenizer}
    run = trainer(tmp_path, rows=rows, given=given, chat_template_kwargs={"think": False})
    texts = [tokenizer.decode(prompt.input_ids) for prompt in run.prompts]
    assert texts == ["user: hi think False", "nowuser: hi think True", "user: hi think False"]
    assert [prompt.columns for prompt in run.prompts] == [{"topic": "a"}, {"topic": "b"}, {"topic": "c"}]
    # A reward model of another family gets them, too.
    judge = tiny._byte_level(["<pad>", "<s>", "</s>", "<more>"], eos_token="</s>", pad_token="<pad>")
    judge.chat_template = SWITCH
    given |= {"reward_processing_classes": judge}
    run = trainer(tmp_path, rows=rows, given=given, chat_template_kwargs={"think": False})
    said = tokenizer("ho", add_special_tokens=False)["input_ids"]
    scored = run.collector.score(run.prompts, [said] * 3, torch.ones(3, dtype=torch.bool))
    ((texts, _),) = scored.passes.values()
    assert [judge.decode(ids) for ids in texts] == [f"{tokenizer.decode(p.input_ids)}ho" for p in run.prompts]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chat_template_kwargs": "x"}, "expected a mapping in chat_template_kwargs, found str"),
        ({"tools": "x"}, "expected tools as JSON, found 'x'"),
        ({"tools": {"name": "now"}}, "expected a list of JSON schemas in tools, found dict"),
    ],
)
def test_wrong_arguments_of_the_template_are_named(row, words):
    with pytest.raises(UserError, match=f"train_dataset row 0: {words}"):
        read_prompts([{"prompt": "a", **row}], tokenizer())


def test_rows_that_share_an_id_get_different_responses(tmp_path):
    rows = [{"prompt": "hello", "prompt_id": "a"}] * 3 + [{"prompt": "hello", "prompt_id": "b"}]
    run = trainer(tmp_path, rows=rows)
    assert [prompt.prompt_id for prompt in run.prompts] == ["a", "a", "a", "b"]
    responses = run.collector.sample(run.prompts, 1).responses
    assert len({tuple(response) for response in responses}) == 4
    alone = trainer(tmp_path, rows=rows[:1] + rows[3:])  # the first of an id is as it was
    assert alone.collector.sample(alone.prompts, 1).responses == [responses[0], responses[3]]


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one two three four"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "five"},
]


def test_rewards_see_what_the_policy_saw_of_a_truncated_prompt():
    def cut(prompt, size):
        return read_prompts([{"prompt": prompt}], tokenizer(), size, "truncate")[0]

    text = cut("one two three four five", 4)
    assert text.content == tokenizer().decode(text.input_ids) != "one two three four five"
    whole = len(cut(MESSAGES, 500).input_ids)
    for size in range(1, whole):
        found = cut(MESSAGES, size)
        tail, kept = tokenizer().decode(found.input_ids, skip_special_tokens=True), found.content
        first, *rest = kept
        assert rest == MESSAGES[len(MESSAGES) - len(rest) :]
        assert MESSAGES[-len(kept)]["content"].endswith(first["content"])
        assert all(message["content"] in tail for message in kept)
        cut_off = MESSAGES[-len(kept)]["content"].removesuffix(first["content"])
        assert not cut_off or not tail.startswith(cut_off[-1] + first["content"])
    assert cut(MESSAGES, whole).content == MESSAGES


def test_a_text_as_a_response_is_written_with_the_options_of_its_prompt():
    template = "{% for m in messages %}{{ m['content'] }} {{ end }}{% endfor %}"
    words = tokenizer()
    words.chat_template = template
    row = {"prompt": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"end": "b"}}
    (prompt,) = read_prompts([row], words, options={"end": "c"})
    found = response_ids(words, prompt, "d", 0)
    assert found == encode_response(words, prompt.content, "d", {"end": "b"})
    assert found != encode_response(words, prompt.content, "d", {"end": "c"})


def test_a_message_may_call_tools_without_content():
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] or m['tool_calls'][0]['name'] }} {% endfor %}"
    call = {"role": "assistant", "tool_calls": [{"name": "b"}]}
    messages = [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "c"}]
    (prompt,) = read_prompts([{"prompt": messages}], words)
    assert prompt.input_ids == words("a b c ")["input_ids"]
    assert prompt.content == messages


def test_the_second_epoch_of_a_seed_is_not_the_first_of_the_next():
    prompts = list(range(50))
    first, second = batches(prompts, 50, 1, 2)
    (other,) = batches(prompts, 50, 2, 1)
    assert sorted(first) == sorted(second) == sorted(other) == prompts
    assert len({tuple(order) for order in (first, second, other)}) == 3


def test_half_a_character_at_the_cut_is_no_part_of_what_rewards_see():
    row = {"prompt": [{"role": "user", "content": "one \u00fc two"}]}
    halves = 0
    for size in range(1, len(read_prompts([row], tokenizer())[0].input_ids)):
        (prompt,) = read_prompts([row], tokenizer(), size, "truncate")
        if tokenizer().decode(prompt.input_ids).startswith("\ufffd"):
            halves += 1
            assert prompt.content[-1]["content"].strip() == "two"
    assert halves == 1


@pytest.mark.parametrize("asked", [{"eval_strategy": "steps", "eval_steps": 1}, {"eval_on_start": True}])
def test_an_empty_evaluation_set_is_none(tmp_path, asked):
    with pytest.raises(UserError, match=rf"^eval_dataset: {next(iter(asked))} needs one, but none was passed$"):
        trainer(tmp_path, given={"eval_dataset": []}, **asked)


def test_what_a_reward_models_template_writes_counts_for_its_positions(tmp_path):
    """200 words more than in the policy's: with a response of 100 tokens they are more than its 256 positions."""
    judge = tiny.gpt2_tokenizer()
    judge.chat_template = "{{ more }}{% for m in messages %}{{ m.content }}{% endfor %}"
    given = {"reward_model": tiny.gpt2_reward(), "reward_processing_classes": judge}
    rows = [{"prompt": [{"role": "user", "content": "of"}]}]
    trainer(tmp_path, given=given, rows=rows, response_length=100)
    with pytest.raises(UserError, match="that response_length=100 more fit the reward reward's 256 positions"):
        trainer(tmp_path, given=given, rows=rows, response_length=100, chat_template_kwargs={"more": "of " * 200})


def test_prompts_of_one_id_draw_by_how_often_it_came_before_not_by_their_place():
    rows = [{"prompt": "a", "prompt_id": name} for name in ("x", "y", "x", "x", "y")]
    streams = ["x", "y", "x\n1", "x\n2", "y\n1"]
    assert [prompt.stream for prompt in read_prompts(rows, tokenizer())] == streams
