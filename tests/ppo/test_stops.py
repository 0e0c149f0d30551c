"""Where a response ends, and what follows from it."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from chat_families import GEMMA, family, user
from tiny_ppo import metrics, trainer
from transformers import AutoModelForCausalLM

from rlhf.data.chat import prepare_tokenizer
from rlhf.data.hh_rlhf import Pair
from rlhf.errors import UserError
from rlhf.ppo.prompts import stops_at_text
from rlhf.reward.trainer import encode_pair

ROWS = [{"prompt": f"say {i}"} for i in range(32)]
OPTIONS = {"per_device_train_batch_size": 16, "response_length": 20, "temperature": 3.0, "max_steps": 1}
CLOSE = {"close_truncated": True}


def constant(completion_ids, **_):
    return [1.0] * len(completion_ids)


def test_the_default_stops_at_every_eos_of_model_and_tokenizer(tmp_path):
    policy = tiny.llama()
    policy.generation_config.eos_token_id = [7, 9]
    run = trainer(tmp_path, given={"model": policy})
    assert run.collector.eos_ids == [run.processing_class.eos_token_id, 7, 9]
    run.save_model()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [7, 9]


@pytest.mark.parametrize("stop", [-1, 400])
def test_a_stop_token_that_is_none_is_refused(tmp_path, stop):
    with pytest.raises(UserError, match=f"^stop_token_id: expected ids of the tokenizer's 400 tokens, found {stop}"):
        trainer(tmp_path, stop_token_id=stop)


@pytest.mark.parametrize(
    ("stop", "also", "belongs"),
    [(None, [], False), (30, [], True), (30, [30], False), (30, [31], True), (2, [], False)],
)
def test_a_stop_token_belongs_to_the_text_unless_the_policy_ends_there_anyway(stop, also, belongs):
    tokenizer, policy = prepare_tokenizer(tiny.chat_tokenizer()), tiny.llama()
    assert tokenizer.decode([30]).strip()
    policy.generation_config.eos_token_id = [2, *also]
    assert stops_at_text(SimpleNamespace(stop_token_id=stop), policy, tokenizer) is belongs


@pytest.mark.parametrize("stop", [0, 7])
def test_the_penalty_follows_the_stop_token(tmp_path, stop):
    """Neither id is the tokenizer's EOS, 2; 0 is a falsy one."""
    options = OPTIONS | {"stop_token_id": stop, "missing_eos_penalty": 3.0, "max_steps": -1, "num_train_epochs": 8}
    run = trainer(tmp_path, rows=ROWS, reward=constant, learning_rate=0.0, num_ppo_epochs=1, **options)
    ended = []
    sample = run.collector.sample

    def keep(*args):
        found = sample(*args)
        responses = found.responses
        ended.append([response[-1] == stop for response in responses])
        assert all(stop not in response[:-1] for response in responses)
        assert all(len(response) == 20 for response, e in zip(responses, ended[-1], strict=True) if not e)
        return found

    run.collector.sample = keep
    run.train()
    assert 0 < sum(map(sum, ended)) < 256
    for row, flags in zip(metrics(tmp_path), ended, strict=True):
        assert row["val/num_eos_tokens"] == sum(flags)
        assert row["objective/eos_rate"] == sum(flags) / 32
        assert row["objective/penalised_scores"] == pytest.approx(1.0 - 3.0 * (1 - sum(flags) / 32))
        assert isinstance(row["eps"], float)


@pytest.mark.parametrize("other", [False, True], ids=["ids", "text"])
def test_rewards_read_a_finished_response_as_in_training_whichever_token_ended_it(tmp_path, other):
    """Gemma's turns end in another token than EOS; 30 is any token that a generation config calls an end."""
    tokenizer, policy = family(GEMMA), tiny.llama()
    eos, turn = 2, 4
    policy.generation_config.eos_token_id = [eos, 30]
    seen = []

    def keep(completions, **_):
        seen.extend(completion[0]["content"] for completion in completions)
        return [0.0] * len(completions)

    given = {"model": policy, "processing_class": tokenizer}
    if other:
        judge = family(GEMMA, "<more>")
        given["reward_processing_classes"] = [judge, None]
    else:
        judge = tokenizer
    run = trainer(tmp_path, rows=[{"prompt": user("hi")}] * 4, reward=[tiny.llama_reward(), keep], given=given)
    assert run.collector.eos_ids == [eos, turn, 30]
    text = tokenizer("It is so.", add_special_tokens=False)["input_ids"]
    responses = [[*text, eos], [*text, turn], [*text, 30], text]
    scored = run.collector.score(run.prompts, responses, torch.ones(4, dtype=torch.bool))
    row = encode_pair(judge, Pair(user("hi"), "It is so.", "No.", "x"))["chosen_ids"]
    (passes,) = scored.passes.values()
    assert passes.texts == [row, row, row, row[:-1]]
    assert scored.scores[0, 0] == scored.scores[1, 0] == scored.scores[2, 0] != scored.scores[3, 0]
    assert seen == ["It is so."] * 4 == [run.collector.text(response) for response in responses]
    closing = trainer(tmp_path, reward=tiny.llama_reward(), given=given | {"reward_processing_classes": judge}, **CLOSE)
    closed = closing.collector.score(run.prompts[:1], [text], torch.ones(1, dtype=torch.bool))
    assert [passes.texts for passes in closed.passes.values()] == [[row]]


def test_a_stop_token_that_is_text_stays_in_it(tmp_path):
    seen = []

    def keep(completions, **_):
        seen.extend(completions)
        return [0.0] * len(completions)

    run = trainer(tmp_path, rows=ROWS[:4], reward=[keep, tiny.llama_reward()], stop_token_id=20)
    dot = run.processing_class.decode([20])
    scored = run.collector.score(run.prompts[:1], [[40, 20]], torch.ones(1, dtype=torch.bool))
    assert seen == [run.processing_class.decode([40]) + dot]
    assert [text[-3:] for passes in scored.passes.values() for text in passes.texts] == [[40, 20, 2]]
    assert run.collector.text([40, 20]) == seen[0]  # for readers, too
