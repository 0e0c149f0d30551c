"""Evaluation spread over processes: the same rows, none lost and none twice, when the count does not divide."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import GPT2ForSequenceClassification
from workers import run

from rlhf.config import EvaluationConfig
from rlhf.data.chat import encode_prompt, encode_response, prepare_tokenizer
from rlhf.data.oasst import TextPrompt
from rlhf.errors import UserError
from rlhf.evaluation.generate import _check_positions, respond, weighted_rewards
from rlhf.generation.decode import generate, uniforms
from rlhf.reward.scoring import score_rows

WORKER = """
import json, sys
import tiny
from rlhf.config import EvaluationConfig
from rlhf.data.chat import prepare_tokenizer
from rlhf.data.oasst import TextPrompt
from rlhf.evaluation.generate import respond, weighted_rewards
from rlhf.distributed.collectives import join_processes

state = join_processes()
prompts = [TextPrompt(prompt_id=f"p{i}", tree_id=f"t{i}", text="word " * (i * 5 % 7 + 1)) for i in range(7)]
config = EvaluationConfig(base_model="unused", eval_response_length=9, eval_batch_size=2, eval_temperature=3.0)
tokenizer = prepare_tokenizer(tiny.chat_tokenizer())
models, counts = (tiny.llama(), tokenizer, tiny.llama_reward()), []
rows = respond("base", *models, prompts, config, [tokenizer.eos_token_id], answered=counts.append)
with open(f"{sys.argv[1]}/counts-{state.process_index}.json", "w") as file:
    json.dump(counts, file)
with open(f"{sys.argv[1]}/rows-{state.process_index}.json", "w") as file:
    json.dump(rows, file)
"""


def evaluate(folder: Path, processes: int) -> list[dict[str, object]]:
    folder.mkdir()
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    run(worker, [str(folder)], processes)
    texts = [path.read_text() for path in folder.glob("rows-*.json")]
    assert len(texts) == processes
    assert len(set(texts)) == 1  # every process gets all rows
    return json.loads(texts[0])


def test_three_processes_give_the_rows_of_one(tmp_path):
    one, three = evaluate(tmp_path / "one", 1), evaluate(tmp_path / "three", 3)
    assert [row["prompt_id"] for row in three] == [f"p{i}" for i in range(7)]
    for first, second in zip(one, three, strict=True):
        assert first.pop("score") == pytest.approx(second.pop("score"), abs=1e-5)
        assert first == second
    for folder, batches in (("one", [2, 2, 2, 1]), ("three", [6, 3])):  # over all processes
        assert json.loads((tmp_path / folder / "counts-0.json").read_text()) == batches


def test_a_cut_response_is_scored_as_if_it_had_ended_where_asked():
    tokenizer, judge = prepare_tokenizer(tiny.chat_tokenizer()), tiny.llama_reward()
    prompts = [TextPrompt(prompt_id="p", tree_id="t", text="word word")]
    eos = [tokenizer.eos_token_id]
    rows = []
    for close in (False, True):
        config = EvaluationConfig(base_model="unused", eval_response_length=5, eval_close_truncated=close)
        rows += respond("base", tiny.llama(), tokenizer, judge, prompts, config, eos)
    assert rows[0]["response"] == rows[1]["response"]
    assert not rows[0]["eos"]
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "word word"}])
    u = uniforms(0, 0, ["p"], 5)
    [response] = generate(tiny.llama(), [prompt], u, eos, 0.7)
    expected = score_rows(judge, [prompt + response, prompt + response + eos], 2).tolist()
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("role", ["model", "reward model", "second reward model"])
def test_every_model_needs_positions_for_prompt_and_response(role):
    models = {"model": tiny.llama(), "reward model": tiny.llama_reward(), "second reward model": tiny.llama_reward(3)}
    models[role].config.max_position_embeddings = 20
    prompts = [TextPrompt(prompt_id="p", tree_id="t", text="of"), TextPrompt(prompt_id="q", tree_id="t", text="of of")]
    config = EvaluationConfig(base_model="unused", eval_response_length=17)
    tokenizer, (policy, judge, gold) = prepare_tokenizer(tiny.chat_tokenizer()), models.values()
    words = rf"^eval_response_length: expected at most \d, so .* fit the 20 positions of the {role}, found 17$"
    with pytest.raises(UserError, match=words):
        respond("base", policy, tokenizer, judge, prompts, config, [tokenizer.eos_token_id], gold=gold)


def test_what_the_template_writes_counts_for_a_reward_model_too(tmp_path):
    """200 words more, in its template alone: with 100 tokens of response they are more than its 256 positions."""
    own = tiny.gpt2_tokenizer()
    own.chat_template = "{{ more }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tiny.gpt2_reward().save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    judge, tokenizer = GPT2ForSequenceClassification.from_pretrained(tmp_path), prepare_tokenizer(tiny.chat_tokenizer())
    prompts = [TextPrompt(prompt_id="p", tree_id="t", text="of")]
    options = {"eval_response_length": 100, "chat_template_kwargs": {"more": "of " * 200}}
    config = EvaluationConfig(base_model="unused", **options)
    with pytest.raises(UserError, match=r"^eval_response_length: .* fit the 256 positions of the reward model"):
        respond("base", tiny.llama(), tokenizer, judge, prompts, config, [tokenizer.eos_token_id])


@pytest.mark.parametrize("gold", [False, True], ids=["first", "second"])
def test_a_score_that_is_not_finite_is_named(gold):
    """At once, and not after all models have answered: no mean or interval could be had."""
    tokenizer, broken = prepare_tokenizer(tiny.chat_tokenizer()), tiny.llama_reward()
    broken.score.weight.data[:] = float("inf")
    models = (tiny.llama_reward(), broken) if gold else (broken, None)
    config = EvaluationConfig(base_model="unused", eval_response_length=5)
    role = "second reward model" if gold else "reward model"
    prompts = [TextPrompt(prompt_id="p0", tree_id="t", text="word")]
    with pytest.raises(UserError, match=rf"^{role}: expected finite scores, found (-?inf|nan) for prompt p0"):
        respond("base", tiny.llama(), tokenizer, models[0], prompts, config, [tokenizer.eos_token_id], gold=models[1])


@pytest.mark.parametrize("gold", [False, True], ids=["first", "second"])
def test_a_reward_model_of_another_family_reads_the_text(tmp_path, gold):
    """Or is refused, where no tokenizer is saved beside it."""
    tokenizer, own = prepare_tokenizer(tiny.chat_tokenizer()), tiny.gpt2_tokenizer()
    tiny.gpt2_reward().save_pretrained(tmp_path)
    judge = GPT2ForSequenceClassification.from_pretrained(tmp_path)
    prompts = [TextPrompt(prompt_id=f"p{i}", tree_id="t", text="word " * (i + 1)) for i in range(3)]
    config = EvaluationConfig(base_model="unused", eval_response_length=5, eval_batch_size=2)

    def rows():
        models = (tiny.llama_reward(), judge) if gold else (judge, None)
        eos = [tokenizer.eos_token_id]
        return respond("base", tiny.llama(), tokenizer, models[0], prompts, config, eos, gold=models[1])

    with pytest.raises(UserError, match=r"reward model .*expected a model that reads the policy's tokens"):
        rows()
    own.save_pretrained(tmp_path)
    found, own = rows(), prepare_tokenizer(own)
    assert not any(row["eos"] for row in found)
    texts = []
    for row in found:
        prompt = [{"role": "user", "content": row["prompt"]}]
        texts.append(encode_prompt(own, prompt) + encode_response(own, prompt, row["response"])[:-1])
    expected = score_rows(judge, texts, 1).tolist()
    assert [row["gold_score" if gold else "score"] for row in found] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_kl_is_of_the_distributions_that_were_sampled_from(temperature):
    tokenizer, policy, base = prepare_tokenizer(tiny.chat_tokenizer()), tiny.llama(), tiny.llama(3)
    prompts = [TextPrompt(prompt_id="p", tree_id="t", text="word word")]
    options = {"eval_response_length": 5, "eval_temperature": temperature, "eval_seed": 4}
    config = EvaluationConfig(base_model="unused", **options)
    [row] = respond("full", policy, tokenizer, tiny.llama_reward(), prompts, config, [2], base=base)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "word word"}])
    [said] = generate(policy, [prompt], uniforms(4, 0, ["p"], 5), [2], temperature)
    with torch.no_grad():
        at = slice(len(prompt) - 1, -1)
        p, q = (torch.softmax(m(torch.tensor([prompt + said])).logits[0, at] / temperature, -1) for m in (policy, base))
    assert row["kl"] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
    assert row["response_length"] == len(said)


def test_a_response_that_any_of_several_ends_has_ended():
    """Here every token ends it, the first sampled one, too: nothing was said."""
    tokenizer = prepare_tokenizer(tiny.chat_tokenizer())
    prompts = [TextPrompt(prompt_id=f"p{i}", tree_id="t", text="word") for i in range(3)]
    config = EvaluationConfig(base_model="unused", eval_response_length=5)
    ends = [399, *range(399)]
    rows = respond("base", tiny.llama(), tokenizer, tiny.llama_reward(), prompts, config, ends)
    assert [(row["eos"], row["response_length"], row["response"]) for row in rows] == [(True, 1, "")] * 3


TEMPLATE = "{{ a }}{{ b }}{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"


def test_what_was_answered_before_is_kept_and_the_rest_has_its_options_columns_and_weights():
    tokenizer, policy, judge = prepare_tokenizer(tiny.chat_tokenizer()), tiny.llama(), tiny.llama_reward()
    tokenizer.chat_template = TEMPLATE
    seen, kept, counts = [], [], []

    def size(completions, topic, **_):
        seen.extend(topic)
        return [float(name[1:]) for name in topic]

    options = {"eval_seed": 3, "eval_response_length": 4, "eval_batch_size": 2, "eval_temperature": 2.0}
    options |= {"chat_template_kwargs": {"a": "1", "b": "2"}, "reward_weights": [2.0, -3.0]}
    config = EvaluationConfig(base_model="unused", **options)
    prompts = [
        TextPrompt(f"p{i}", "t", "of " * i + "x", columns={"topic": f"t{i}"}, options={"b": "7"} if i == 4 else {})
        for i in range(5)
    ]
    rewards = weighted_rewards(judge, [size], policy, tokenizer, config)
    done = {"p1": {"prompt_id": "p1", "score": 99.0}}
    eos = [tokenizer.eos_token_id]
    rows = respond(
        "full", policy, tokenizer, rewards, prompts, config, eos, answered=counts.append, done=done, keep=kept.append
    )
    assert [row["prompt_id"] for row in rows] == ["p0", "p1", "p2", "p3", "p4"]
    assert rows[1] == done["p1"]
    assert counts == [1, 2, 2]
    assert kept == [[rows[0], rows[2]], rows[3:]]
    assert seen == ["t0", "t2", "t3", "t4"]
    for i in (0, 2, 3, 4):
        prompt = tokenizer(f"1{7 if i == 4 else 2}{prompts[i].text}:")["input_ids"]
        [said] = generate(policy, [prompt], uniforms(3, 0, [f"p{i}"], 4), eos, 2.0)
        row = rows[i]
        assert (row["model"], row["prompt"]) == ("full", prompts[i].text)
        assert (row["prompt_length"], row["response_length"], row["eos"]) == (len(prompt), len(said), said[-1] in eos)
        assert row["response"] == tokenizer.decode(said, skip_special_tokens=True).strip()
        assert row["score"] == pytest.approx(2 * score_rows(judge, [prompt + said], 1).item() - 3 * i, abs=1e-4)


def test_prompt_and_response_may_fill_all_positions():
    tokenizer, policy = prepare_tokenizer(tiny.chat_tokenizer()), tiny.llama()
    prompts = [TextPrompt(prompt_id="p", tree_id="t", text="of"), TextPrompt(prompt_id="q", tree_id="t", text="of of")]
    longest = len(encode_prompt(tokenizer, prompts[1].messages))
    policy.config.max_position_embeddings = longest + 3
    _check_positions(policy, [], tokenizer, prompts, EvaluationConfig(base_model="unused", eval_response_length=3))
    words = f"^eval_response_length: expected at most 3, .* prompt, of {longest} tokens, .* of the model, found 4$"
    with pytest.raises(UserError, match=words):
        _check_positions(policy, [], tokenizer, prompts, EvaluationConfig(base_model="unused", eval_response_length=4))


def test_a_sum_of_rewards_that_is_not_finite_names_all_of_them_and_its_prompt():
    def size(completions, **_):
        return [1.0, float("inf")][: len(completions)]

    tokenizer, policy = prepare_tokenizer(tiny.chat_tokenizer()), tiny.llama()
    config = EvaluationConfig(base_model="unused", eval_response_length=2)
    rewards = weighted_rewards(tiny.llama_reward(), [size], policy, tokenizer, config)
    prompts = [TextPrompt(prompt_id=name, tree_id="t", text="word") for name in ("p", "q")]
    words = r"^rewards reward model, size: expected finite scores, found inf for prompt q$"
    with pytest.raises(UserError, match=words):
        respond("base", policy, tokenizer, rewards, prompts, config, [tokenizer.eos_token_id])
