"""What reward functions are passed and may return: as TRL has it, and one line for the rest."""

import asyncio
import functools
import json
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from tiny_ppo import metrics, trainer
from torch.testing import assert_close

from rlhf import RemoteReward
from rlhf.errors import UserError
from rlhf.reward.calls import Logged, accepted, as_scores, call

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("found", "scores"),
    [
        ([1, 2.5, True], [1, 2.5, 1]),
        ((x for x in (1, 2, 3)), [1, 2, 3]),
        ([1.0, None, NAN], [1, NAN, INF]),
        (np.array([1, 2, 3]), [1, 2, 3]),
        (np.array([1, None, 3], dtype=object), [1, NAN, 3]),
        ([np.float32(1), torch.tensor(2), torch.tensor([3.0])], [1, 2, 3]),
        (torch.arange(3, dtype=torch.bfloat16, requires_grad=True), [0, 1, 2]),
        (torch.tensor([[1.0], [NAN], [3.0]]), [1, INF, 3]),
    ],
)
def test_scores_of_any_kind(found, scores):
    assert_close(as_scores("f", found, 3), torch.tensor(scores, dtype=torch.float32), equal_nan=True)


@pytest.mark.parametrize("found", [2, 2.0, np.float64(2), torch.tensor(2.0), np.array(2), [2], torch.tensor([[2.0]])])
def test_one_number_for_one_response(found):
    assert as_scores("f", found, 1).tolist() == [2.0]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "expected 3 numbers, one per completion, found None; does it return?"),
        (1.0, "expected 3 numbers, found 1"),
        ([1.0, 2.0], "expected 3 numbers, found 2"),
        (torch.zeros(2, 3), "expected 3 numbers, found 2"),
        (torch.zeros(3, 2), "found list [0.0, 0.0] for completion 0"),
        ("1.0", "one per completion, found str '1.0'"),
        ({"score": [1, 2, 3]}, "one per completion, found dict {'score': [1, 2, 3]}"),
        ({1.0, 2.0, 3.0}, "one per completion, found set"),
        ([1.0, "0.5", 2.0], "expected a number or None for each completion, found str '0.5' for completion 1"),
        ([{"a": 1}] * 3, "found dict {'a': 1} for completion 0"),
        ([1.0, 2.0, 10**400], "for completion 2"),
    ],
)
def test_anything_else_is_a_line_that_names_the_function(found, words):
    with pytest.raises(UserError) as error:
        as_scores("f", found, 3)
    assert str(error.value).startswith("reward f: ")
    assert words in str(error.value)


def test_a_function_gets_the_arguments_that_it_takes():
    given = {"prompts": 1, "completions": 2, "topic": 3}
    assert accepted("f", lambda completions: 0, given) == {"completions": 2}
    assert accepted("f", lambda completions, *, topic=None, other=5: 0, given) == {"completions": 2, "topic": 3}
    assert accepted("f", lambda prompts, **rest: 0, given) == given
    assert accepted("f", functools.partial(lambda scale, prompts: 0, 2.0), given) == {"prompts": 1}
    with pytest.raises(UserError, match=r"reward f: the function takes 'answer', .*no such column; there are prompts"):
        accepted("f", lambda prompts, answer, **rest: 0, given)
    with pytest.raises(UserError, match=r"reward f: the function takes 'prompts' by position, but arguments come by"):
        accepted("f", lambda prompts, /, **rest: 0, given)
    assert accepted("f", lambda extra=1, /, prompts=2: 0, given) == {"prompts": 1}
    assert accepted("f", max, given) == given  # it says nothing of its arguments


def test_a_missing_column_is_said_before_training(tmp_path):
    def exact(completions, answer, **_):
        return [0.0] * len(completions)

    with pytest.raises(UserError, match="reward exact: the function takes 'answer'"):
        trainer(tmp_path, reward=exact)


class Judge:
    async def __call__(self, prompts, completions, **columns):
        await asyncio.sleep(0.01)
        return [1.0] * len(prompts)


async def judge(prompts, completions, trainer_state, log_metric, log_extra, **columns):
    await asyncio.sleep(0.01)
    log_metric("judge/step", trainer_state.global_step)
    log_metric("judge/step", trainer_state.global_step + 2)
    log_metric("judge/of_nothing", NAN)
    log_extra("grade", [torch.tensor(3), "b", None, {"c"}][: len(prompts)])
    return [None, 2.0, 2.0, 2.0][: len(prompts)]


def test_async_functions_are_waited_for_and_what_they_log_is_kept(tmp_path):
    rows = [{"prompt": f"say {i}"} for i in range(4)]
    given, small = {"eval_dataset": rows[:3]}, {"per_device_eval_batch_size": 2}
    rewards = [judge, Judge(), functools.partial(judge)]
    run = trainer(tmp_path, rows=rows, reward=rewards, given=given, max_steps=2, **small)
    run.train()
    found = metrics(tmp_path)
    assert [row["rewards/Judge/mean"] for row in found] == [1.0, 1.0]
    assert [row["rewards/judge_0/mean"] for row in found] == [2.0, 2.0]
    assert [row["judge/step"] for row in found] == [1.0, 2.0]
    assert "judge/of_nothing" not in found[0]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["grade"] for row in samples[:4]] == [3, "b", None, "{'c'}"]
    assert run.evaluate()["eval/judge/step"] == 3.0
    assert [row["grade"] for row in run.generate_completions()] == [3, "b", 3]  # two batches


def test_async_functions_run_at_the_same_time():
    both = asyncio.Barrier(2)  # neither gets through alone

    async def meet():
        async with asyncio.timeout(30):
            await both.wait()
        return [1.0]

    waits = [call("f", meet, {}), call("g", meet, {})]
    assert [wait() for wait in waits] == [[1.0], [1.0]]


@pytest.mark.parametrize("is_async", [False, True])
def test_an_error_says_which_function_it_is_of(is_async):
    async def later():
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as error:
        call("f", later if is_async else lambda: 1 / 0, {})()
    assert error.value.__notes__ == ["in reward f"]
    with pytest.raises(ZeroDivisionError) as error:
        as_scores("f", (1 / n for n in [0]), 1)
    assert error.value.__notes__ == ["in reward f"]


def test_a_column_has_a_value_per_response():
    with pytest.raises(UserError, match=r"reward f: log_extra\('grade'\): expected 2 values, found 1"):
        Logged().extra("grade", [1], 2, "f")


def test_a_response_beyond_those_that_a_function_saw_has_the_other_columns():
    assert Logged(columns={"first": [1], "both": [1, None]}).row(1) == {"both": None}


def ask(remote, n=3, **columns):
    prompts, completions = [f"p{i}" for i in range(n)], [f"c{i}" for i in range(n)]
    arguments = {"prompts": prompts, "completions": completions, "completion_ids": [[1]] * n} | columns
    return call(remote.__name__, remote, arguments)()


def test_a_remote_judge_sees_a_row_at_a_time_and_only_so_many_at_once():
    at_once, most = 0, 0

    async def grade(prompt, completion, topic):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.01)
        at_once -= 1
        assert prompt[1:] == completion[1:] == topic[1:]
        return None if prompt == "p2" else float(prompt[1:])

    found = ask(RemoteReward(grade, max_concurrency=2), 5, topic=[f"t{i}" for i in range(5)], other=[0] * 5)
    assert found == [0.0, 1.0, None, 3.0, 4.0]
    assert most == 2
    assert RemoteReward(grade).__name__ == "grade"


def test_a_remote_judge_that_takes_all_columns_gets_those_of_the_row_alone():
    async def grade(**row):
        return float(row == {"prompt": "p1", "completion": "c1", "topic": "t1", "other": 1})

    trainers = {"trainer_state": None, "log_metric": print, "log_extra": print}
    least = RemoteReward(grade, max_concurrency=1, max_retries=0)
    assert ask(least, 2, topic=["t0", "t1"], other=[0, 1], **trainers) == [0.0, 1.0]


def test_a_remote_judge_is_asked_again():
    asked = []

    async def grade(prompt, completion):
        asked.append(prompt)
        if asked.count(prompt) == 1:
            raise ConnectionError("busy")
        if asked.count(prompt) == 2:
            await asyncio.sleep(60)
        return 1.0

    assert ask(RemoteReward(grade, max_retries=2, timeout=0.1, wait=0.01)) == [1.0] * 3
    assert len(asked) == 9


@pytest.mark.parametrize(("wait", "why"), [(0, "ConnectionError: busy"), (60, "no answer in 0.05 s")])
def test_a_judge_that_never_answers_ends_the_run_or_gives_no_score(wait, why):
    asked = 0

    async def grade(prompt, completion):
        nonlocal asked
        asked += 1
        await asyncio.sleep(wait)
        raise ConnectionError("busy")

    options = {"max_retries": 1, "timeout": 0.05, "wait": 0.01}
    began = time.monotonic()
    with pytest.raises(UserError, match=f"reward grade: 2 requests for one response failed: {why}"):
        ask(RemoteReward(grade, **options))
    assert time.monotonic() - began < 30
    asked = 0
    assert ask(RemoteReward(grade, required=False, **options)) == [None] * 3
    assert asked == 6


@pytest.mark.parametrize("options", [{"max_concurrency": 0}, {"max_retries": -1}, {"timeout": 0}, {"timeout": -1}])
def test_limits_are_checked(options):
    with pytest.raises(UserError, match=f"RemoteReward: {next(iter(options))}: expected"):
        RemoteReward(judge, **options)


def test_a_remote_judge_is_given_more_time_before_each_further_try(monkeypatch):
    waits, sleep = [], asyncio.sleep

    async def soon(seconds):
        waits.append(seconds)
        await sleep(0)

    async def grade(prompt, completion):
        raise ConnectionError("busy")

    monkeypatch.setattr("rlhf.reward.remote.asyncio.sleep", soon)
    assert ask(RemoteReward(grade, max_retries=7, wait=0.5, required=False), 1) == [None]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]


def test_true_is_one_number_and_what_is_not_finite_is_not_logged():
    assert as_scores("f", True, 1).tolist() == [1.0]
    logged = Logged()
    for value in (INF, 2.0, -INF, NAN):
        logged.metric("a", value)
    assert logged.metrics == {"a": [2.0]}


def test_a_wait_that_is_broken_off_ends_the_function(monkeypatch):
    ended = threading.Event()

    async def judge():
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    def interrupted(future):
        raise KeyboardInterrupt

    result = call("f", judge, {})
    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        result()
    assert ended.wait(30)


def test_one_answer_that_fails_ends_the_other_requests():
    ended = threading.Event()

    async def grade(prompt, completion):
        if prompt == "p0":
            await asyncio.sleep(0.01)
            raise ConnectionError("busy")
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with pytest.raises(UserError, match="ConnectionError: busy"):
        ask(RemoteReward(grade, max_retries=0), 2)
    assert ended.wait(30)
