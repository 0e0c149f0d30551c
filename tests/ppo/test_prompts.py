"""Rows become prompts; what is too long, spread out or empty is answered as asked for."""

from itertools import chain

import pytest
import tiny
import torch
from tiny_ppo import trainer

from rlhf.data.chat import prepare_tokenizer
from rlhf.errors import UserError
from rlhf.ppo.prompts import as_row, batches, read_prompts

LONG = [{"prompt": "a"}, {"prompt": "a b c d e f g h i j"}, {"prompt": "b"}]


def tokenizer():
    return prepare_tokenizer(tiny.chat_tokenizer())


def test_long_prompts_are_refused_dropped_or_cut_at_the_front():
    with pytest.raises(UserError, match="train_dataset row 1: expected 1 to 5 tokens, found 1"):
        read_prompts(LONG, tokenizer(), 5)
    assert [p.prompt_id for p in read_prompts(LONG, tokenizer(), 5, "drop")] == ["0", "2"]
    whole = read_prompts(LONG, tokenizer())[1].input_ids
    assert read_prompts(LONG, tokenizer(), 5, "truncate")[1].input_ids == whole[-5:]


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
        ("a", "expected columns with values, found str"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(row, words):
    with pytest.raises(UserError, match=f"train_dataset row 0: {words}"):
        read_prompts([row], tokenizer())


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


def test_bare_prompts_become_rows():
    assert as_row("a", "x") == {"prompt_id": "x", "prompt": "a"}
    assert as_row(torch.tensor([1, 2]), "x") == {"prompt_id": "x", "input_ids": [1, 2]}
    assert as_row([{"role": "user", "content": "a"}], "x")["prompt"][0]["content"] == "a"


def test_each_epoch_has_its_own_order_and_every_prompt_once():
    prompts = read_prompts([{"prompt": str(i)} for i in range(10)], tokenizer())
    seen = [[p.prompt_id for p in batch] for batch in batches(prompts, 4, 3, 6)]
    assert [len(batch) for batch in seen] == [4, 4, 2, 4, 4, 2]
    first, second = list(chain(*seen[:3])), list(chain(*seen[3:]))
    assert sorted(first) == sorted(second) == [str(i) for i in range(10)]
    assert first != second
    assert [[p.prompt_id for p in b] for b in batches(prompts, 4, 3, 6)] == seen
