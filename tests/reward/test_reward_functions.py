"""Rewards of all kinds: models with any head and tokenizer family, functions, several with weights."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tiny_ppo import metrics, trainer
from torch.testing import assert_close
from transformers import LlamaForSequenceClassification

from rlhf.errors import UserError
from rlhf.models.actor_critic import FrozenRole
from rlhf.reward import tokenizers
from rlhf.reward.reward_functions import Completions, FunctionReward, TokenReward
from rlhf.reward.scoring import score_rows, score_tokens
from rlhf.reward.tokenizers import same_vocabulary

TEXTS = [{"prompt": f"say {i}", "topic": f"t{i}", "weight": i} for i in range(4)]


def lengths(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def sometimes(completion_ids, **_):
    return [None if i % 2 else 10.0 for i in range(len(completion_ids))]


def collect(run):
    return run.collect(1, run.prompts[: run.batch_size])


def test_a_function_sees_prompts_completions_ids_and_columns(tmp_path):
    seen = {}

    def keep(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, columns=columns)
        return [1.5] * len(prompts)

    run = trainer(tmp_path, rows=TEXTS, reward=keep)
    out = collect(run)
    assert seen["prompts"] == [row["prompt"] for row in TEXTS]
    assert seen["ids"] == out.responses
    assert seen["completions"] == [run.processing_class.decode(r, skip_special_tokens=True) for r in out.responses]
    assert seen["columns"] == {"topic": ["t0", "t1", "t2", "t3"], "weight": [0, 1, 2, 3]}
    assert out.reward_names == ["keep"]
    assert out.raw_score.tolist() == [1.5] * 4
    text = "\n said \n"  # white space stays, as in TRL
    ids = run.processing_class(text)["input_ids"]
    run.rewards[0](Completions(["x"], [[5]], [ids], [False], [{}]))
    assert seen["completions"] == [text]


def test_a_column_that_some_rows_lack_is_none_there():
    seen = []

    def keep(prompts, topic, **_):
        seen.extend(topic)
        return [0.0] * len(prompts)

    columns = [{}, {"topic": "b"}]
    completions = Completions(["x", "y"], [[5], [6]], [[7], [8]], ended=[False, False], columns=columns)
    FunctionReward("keep", keep, tiny.gpt2_tokenizer())(completions)
    assert seen == [None, "b"]


def test_what_a_function_changes_is_its_own(tmp_path):
    seen = []

    def spoil(prompts, completions, tags, **_):
        seen.append([*map(len, prompts), *map(len, tags)])
        for prompt, completion, tag in zip(prompts, completions, tags, strict=True):
            prompt.extend(completion)
            prompt[0]["content"] = tag.append("x")
        return [0.0] * len(prompts)

    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}], "tags": []} for i in range(4)]
    run = trainer(tmp_path, rows=rows, reward=[spoil, spoil])
    for _ in range(2):
        collect(run)
    assert seen == [[1, 1, 1, 1, 0, 0, 0, 0]] * 4
    assert [prompt.text for prompt in run.prompts] == [f"say {i}" for i in range(4)]


def test_conversations_are_answered_by_messages(tmp_path):
    seen = []

    def keep(completions, **_):
        seen.extend(completions)
        return [0.0] * len(completions)

    collect(trainer(tmp_path, reward=keep))
    assert all([message["role"] for message in completion] == ["assistant"] for completion in seen)


def test_several_rewards_are_weighed_and_logged_by_name(tmp_path):
    model = tiny.llama_reward()
    model.config.name_or_path = "some/judge"
    run = trainer(tmp_path, reward=[lengths, model, sometimes], reward_weights=[0.5, 2.0, -1.0], max_steps=1)
    out = collect(run)
    scores = out.scores
    assert out.reward_names == ["lengths", "judge", "sometimes"]
    assert scores[:, 0].tolist() == [len(r) for r in out.responses]
    assert [math.isnan(x) for x in scores[:, 2].tolist()] == [False, True, False, True]
    no_opinion_is_0 = torch.tensor([10.0, 0.0, 10.0, 0.0])
    assert_close(out.raw_score, 0.5 * scores[:, 0] + 2.0 * scores[:, 1] - no_opinion_is_0)
    run.train()
    (row,) = metrics(tmp_path)
    assert row["rewards/sometimes/mean"] == 10.0
    assert row["rewards/sometimes/std"] == 0.0
    assert row["rewards/lengths/mean"] == pytest.approx(row["objective/response_length"])
    mean = 0.5 * row["rewards/lengths/mean"] + 2 * row["rewards/judge/mean"] - 5.0
    assert row["objective/scores"] == pytest.approx(mean, abs=1e-5)


def test_raw_and_penalised_scores_are_apart(tmp_path):
    run = trainer(tmp_path, reward=lengths, missing_eos_penalty=3.0, score_clip=4.0, max_steps=1)
    run.train()
    (row,) = metrics(tmp_path)
    assert row["objective/scores"] == pytest.approx(row["rewards/lengths/mean"])
    assert row["objective/eos_rate"] < 1
    clipped = row["objective/penalised_scores"] + 3.0 * (1 - row["objective/eos_rate"])
    assert clipped <= 4.0
    assert clipped < row["objective/scores"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_peft_reward_model_scores_with_its_adapter_and_starts_the_critic(tmp_path, lora):
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny.llama_reward(), config).eval()
    row = torch.tensor([[5, 6, 7, 2]])
    whole = torch.ones_like(row, dtype=torch.bool)
    with torch.no_grad():
        expected = score_tokens(model.get_base_model(), row, whole)
    run = trainer(tmp_path, lora=lora, reward=model, max_steps=1)
    with torch.no_grad(), run.roles.reward.active():
        for base in (run.roles.reward.base, run.roles.trained.critic_base.eval()):
            assert_close(score_tokens(base, row, whole), expected, atol=1e-5, rtol=0)
    run.train()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_without_a_model_the_critic_starts_as_the_policy_at_0(tmp_path, lora):
    run = trainer(tmp_path, reward=lengths, lora=lora, max_steps=1)
    assert collect(run).values.abs().max() == 0
    run.train()
    assert isinstance(run.roles.trained.critic, LlamaForSequenceClassification) or lora


def two_labels():
    config = tiny.llama_reward().config
    config.num_labels = 2
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize(
    ("reward", "options", "words"),
    [
        (tiny.llama(), {}, "expected a sequence-classification model, found LlamaForCausalLM"),
        (two_labels(), {}, "expected a head with 1 label, found 2"),
        (torch.nn.Linear(2, 2), {}, "function of .prompts, completions, ....*found Linear"),
        ("some/model", {}, "found str"),
        ([lengths, lengths], {"reward_weights": [1.0]}, "reward_weights: expected 2 values, one per reward, found 1"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(tmp_path, reward, options, words):
    with pytest.raises(UserError, match=words):
        trainer(tmp_path, reward=reward, **options)


def test_a_function_with_too_few_numbers_is_named(tmp_path):
    def short(completions, **_):
        return [1.0]

    with pytest.raises(UserError, match="reward short: expected 4 numbers, found 1"):
        collect(trainer(tmp_path, reward=short))


def test_scores_of_the_reference_have_mean_0_and_deviation_1_before_ppo(tmp_path, capsys):
    rows = [{"prompt": "a b c d e"[: i % 9 + 1], "prompt_id": str(i)} for i in range(4096)]
    options = {"max_steps": 1, "gradient_accumulation_steps": 256, "disable_tqdm": False}  # so many rows at a time
    run = trainer(tmp_path, rows=rows, score_norm_samples=4096, **options)
    run._begin(0)
    scores = torch.cat(
        [run.compute_advantages(run.collect(2 + i, run.prompts[i * 512 :][:512]), run.scaler).score for i in range(8)]
    )  # new samples: the mean's standard error is 0.022, with that of the first ones
    assert len(scores) == 4096
    assert abs(scores.mean()) < 0.05
    assert abs(scores.std() - 1) < 0.05
    assert "scores of the reference: mean" in capsys.readouterr().out


def test_prompts_as_rows_of_any_kind_train(tmp_path):
    tokenizer = tiny.chat_tokenizer()
    dialogue = [{"role": "user", "content": "hi"}]
    for i, rows in enumerate(
        [
            [{"prompt": "hello", "other": None}] * 3,
            [{"prompt": dialogue, "other": "x"}] * 3,
            [{"messages": [*dialogue, {"role": "assistant", "content": "never seen"}]}] * 3,
            [
                {
                    "input_ids": tokenizer("hello")["input_ids"],
                    "attention_mask": [1] * len(tokenizer("hello")["input_ids"]),
                }
            ]
            * 3,
        ]
    ):
        tokenizer.padding_side = "right"
        run = trainer(tmp_path / str(i), rows=rows, reward=lengths, max_steps=1, given={"processing_class": tokenizer})
        run.train()
        assert "never" not in str(run.prompts[0].text)


def test_eos_is_appended_to_truncated_responses_if_asked_for(tmp_path):
    """By hand, token by token: an EOS after a truncated response, nothing after one that ended."""
    completions = Completions(
        prompts=["say", "say"],
        prompt_ids=[[5, 6], [5, 6]],
        response_ids=[[7, 8], [9, 1]],
        ended=[False, True],
        columns=[{}, {}],
    )
    role = FrozenRole(tiny.llama_reward())
    as_is = score_rows(role.model, [[5, 6, 7, 8], [5, 6, 9, 1]], 2)
    closed = score_rows(role.model, [[5, 6, 7, 8, 1], [5, 6, 9, 1]], 2)
    assert_close(TokenReward("judge", role, 2)(completions), as_is)
    assert_close(TokenReward("judge", role, 2, 1, close_truncated=True)(completions), closed)
    assert as_is[0] != closed[0]


@pytest.mark.parametrize("family", ["same", "other"])
def test_close_truncated_reaches_every_model(tmp_path, family):
    """The tiny policy's responses are truncated at 6 tokens: the score is that of the text with an EOS."""
    model, given = tiny.gpt2_reward(), {"reward_processing_classes": tiny.gpt2_tokenizer()} if family == "other" else {}
    model = model if family == "other" else tiny.llama_reward()
    cut, closed = (
        trainer(tmp_path / str(value), reward=model, given=given, close_truncated=value) for value in (False, True)
    )
    first, second = collect(cut), collect(closed)
    assert first.responses == second.responses
    assert not first.ended.any()
    assert (first.raw_score != second.raw_score).all()


def test_a_vocabulary_is_the_same_only_with_the_same_numbers():
    def known(pad=None, **numbers):
        return SimpleNamespace(get_vocab=lambda: numbers, pad_token=pad, eos_token="e", bos_token=None, unk_token=None)

    policy = known(a=0, b=1, e=2)
    assert same_vocabulary(policy, known(a=0, b=1, e=2, more=3))
    assert not same_vocabulary(policy, known(a=1, b=0, e=2))  # the same tokens under other numbers
    assert not same_vocabulary(policy, known(a=0, e=2))
    assert same_vocabulary(known("p", a=0, p=9), known(a=0))  # a pad token of its own is hidden by masks
    assert not same_vocabulary(known("e", a=0, e=2), known(a=0))  # one that is the EOS is not
    for name in ("bos_token", "unk_token"):  # nor another one that a text may have
        policy = known("x", a=0, x=2)
        setattr(policy, name, "x")
        assert not same_vocabulary(policy, known(a=0))


@pytest.mark.parametrize(("shared", "fits"), [(10, True), (9, True), (8, False)])
def test_a_critic_has_nine_of_ten_tokens_in_common_with_the_policy(monkeypatch, shared, fits):
    numbers = {str(i): i for i in range(10)}
    policy = SimpleNamespace(get_vocab=lambda: numbers)
    other = {token: i if i < shared else i + 50 for token, i in numbers.items()}
    other |= {f"more {i}": 100 + i for i in range(10)}  # what only the critic knows does not count
    own = SimpleNamespace(get_vocab=lambda: other, name_or_path="judge")
    monkeypatch.setattr(tokenizers, "own_tokenizer", lambda _: own)
    monkeypatch.setattr(tokenizers, "_check_range", lambda *_: None)
    if fits:
        tokenizers.check_value_model(tiny.llama_reward(), policy, None)
        return
    with pytest.raises(UserError, match=r"^value_model: .* found judge with 8 of 10 tokens in common$"):
        tokenizers.check_value_model(tiny.llama_reward(), policy, None)


@pytest.mark.parametrize(
    ("rows", "policy", "fits"),
    [
        (400, None, True),
        (397, None, True),  # 1 per cent of the tokens may be without a row: those of images, say
        (396, None, False),
        (400, 400, True),
        (397, 397, True),  # the policy never samples what neither has a row for
        (397, 400, False),
        (397, 398, False),
    ],
)
def test_a_model_has_a_row_for_each_token_that_it_may_read(rows, policy, fits):
    tokenizer = tiny.chat_tokenizer()  # 400 tokens
    model, other = (
        n and SimpleNamespace(get_input_embeddings=lambda n=n: torch.nn.Embedding(n, 1)) for n in (rows, policy)
    )
    with (
        nullcontext() if fits else pytest.raises(UserError, match=f"^x: .* for the 400 tokens of .*, found {rows}: is")
    ):
        tokenizers._check_range("x", model, tokenizer, other)


def test_a_column_may_be_in_some_rows_alone_but_in_each_set(tmp_path):
    def topical(completions, topic):
        return [float(x == "cities") for x in topic]

    rows = [{"prompt": "a"}, {"prompt": "b", "topic": "cities"}]
    run = trainer(tmp_path, rows=rows, reward=topical, given={"eval_dataset": rows[::-1]})
    assert collect(run).scores.flatten().tolist().count(1.0) == 1
    with pytest.raises(UserError, match=r"^reward topical: the function takes 'topic', but the rows"):
        trainer(tmp_path, rows=rows, reward=topical, given={"eval_dataset": {"one": rows, "other": rows[:1]}})


def test_what_a_function_does_to_its_arguments_stays_with_it():
    def spoil(prompts, completion_ids, terms, names, **_):
        prompts[0].clear()
        completion_ids[0].clear()
        terms[0]["weights"].clear()
        names[0].clear()
        return [1.0]

    prompt, columns = [{"role": "user", "content": "a"}], {"terms": {"weights": [0.5]}, "names": ["b"]}
    batch = Completions([prompt], [[5]], [[6, 2]], [True], [columns])
    assert FunctionReward("f", spoil, tiny.chat_tokenizer())(batch).tolist() == [1.0]
    assert (prompt, columns) == ([{"role": "user", "content": "a"}], {"terms": {"weights": [0.5]}, "names": ["b"]})
    assert batch.response_ids == [[6, 2]]


def test_one_of_several_eos_of_a_model_may_be_the_policys():
    model, policy = tiny.llama_reward(), SimpleNamespace(eos_token_id=2)
    for ids in ([7, 2], 2, None):
        model.config.eos_token_id = ids
        tokenizers._check_eos("x", model, policy, "")
    for ids in ([7, 9], 7):
        model.config.eos_token_id = ids
        with pytest.raises(UserError, match=r"^x: expected .* with EOS id 2, found "):
            tokenizers._check_eos("x", model, policy, "")
