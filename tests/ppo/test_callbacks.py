"""Steps, logs, evaluations, checkpoints and callbacks happen when the arguments say so."""

import json
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_ppo import PROMPTS, metrics, trainer
from transformers import TrainerCallback, TrainerControl

from rlhf.errors import UserError
from rlhf.ppo.callbacks import Callbacks
from rlhf.ppo.evaluation import sample_rows
from rlhf.reward.calls import Logged
from rlhf.storage.checkpoint import checkpoints

UNSEEN = [{"prompt": f"unseen {i}", "prompt_id": f"u{i}"} for i in range(5)]


class Diary(TrainerCallback):
    """Writes down what it is told."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda args, state, control, **kwargs: self.events.append((name, state.global_step))
        return super().__getattribute__(name)


def steps(folder, name="metrics.jsonl"):
    return [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("options", "logged"),
    [
        ({}, [1, 2, 3, 4]),
        ({"logging_steps": 2}, [2, 4]),
        ({"logging_steps": 0.5}, [2, 4]),  # a share of all steps
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3]),
        ({"logging_strategy": "epoch"}, [2, 4]),
        ({"logging_strategy": "no"}, []),
        ({"max_steps": 3}, [1, 2, 3]),
        ({"total_episodes": 9}, [1, 2, 3]),
        ({"num_train_epochs": 1}, [1, 2]),
    ],
)
def test_rows_are_logged_when_the_arguments_say_so(tmp_path, options, logged):
    trainer(tmp_path, **options).train()
    file = tmp_path / "metrics.jsonl"
    assert (steps(tmp_path) if file.exists() else []) == logged


def test_callbacks_are_told_everything_in_order(tmp_path):
    diary = Diary()
    given = {"callbacks": [diary], "eval_dataset": UNSEEN}
    trainer(tmp_path, given=given, eval_strategy="epoch", save_strategy="epoch", num_ppo_epochs=1).train()
    step = ["on_step_begin", "on_substep_end", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"]
    epoch = ["on_epoch_begin", *step, "on_step_end", "on_log", *step, "on_step_end", "on_log"]
    epoch += ["on_epoch_end", "on_evaluate", "on_save"]
    assert [name for name, _ in diary.events] == ["on_init_end", "on_train_begin", *epoch, *epoch, "on_train_end"]
    assert [n for name, n in diary.events if name == "on_step_end"] == [1, 2, 3, 4]


def test_callbacks_see_so_many_epochs(tmp_path):
    """Two steps each: three are one and a half, which are rounded up."""
    run = trainer(tmp_path, max_steps=3)
    run.callbacks.begin(1, 3, run.steps_per_epoch)
    state = run.state
    assert (state.max_steps, state.num_train_epochs, state.train_batch_size) == (3, 2, 2)
    assert (state.global_step, state.epoch) == (1, 0.5)
    run.callbacks.begin(0, 1, 4)
    assert state.num_train_epochs == 1


def test_an_epoch_of_one_step_begins_and_ends_with_it(tmp_path):
    diary = Diary()
    trainer(tmp_path, rows=PROMPTS[:3], given={"callbacks": [diary]}, max_steps=2, num_ppo_epochs=1).train()
    told = [(name, n) for name, n in diary.events if "epoch" in name]
    assert told == [("on_epoch_begin", 0), ("on_epoch_end", 1), ("on_epoch_begin", 1), ("on_epoch_end", 2)]


def test_a_callback_may_stop_the_run(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer(tmp_path, given={"callbacks": [Stop]}).train()
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("options", "evaluated"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4]),
        ({"eval_strategy": "steps", "eval_steps": 3}, [3, 4]),
        ({"eval_strategy": "epoch"}, [2, 4]),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3}, [4]),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}, [0, 2, 4]),
    ],
)
def test_evaluation_over_the_whole_set(tmp_path, options, evaluated):
    run = trainer(tmp_path, given={"eval_dataset": UNSEEN}, per_device_eval_batch_size=2, **options)
    asked = []
    sample = run.collector.sample
    run.collector.sample = lambda prompts, step, *rest: (
        asked.extend(p.prompt_id for p in prompts),
        sample(prompts, step, *rest),
    )[1]
    run.train()
    assert steps(tmp_path, "eval_metrics.jsonl") == evaluated
    assert [i for i in asked if i.startswith("u")] == ["u0", "u1", "u2", "u3", "u4"] * len(evaluated)
    row = json.loads((tmp_path / "eval_metrics.jsonl").read_text().splitlines()[-1])
    assert {
        "eval/scores",
        "eval/kl_per_token",
        "eval/response_length",
        "eval/eos_rate",
        "eval/rewards/reward/mean",
    } <= set(row)


def test_a_resumed_run_begins_neither_with_an_evaluation_nor_with_scores_of_the_reference(tmp_path, capsys):
    options = {"eval_on_start": True, "score_norm_samples": 4, "save_strategy": "steps", "save_steps": 1}
    options |= {"given": {"eval_dataset": UNSEEN}}
    trainer(tmp_path, max_steps=1, **options).train()
    assert "scores of the reference: mean" in capsys.readouterr().out
    trainer(tmp_path, max_steps=2, **options).train(resume_from_checkpoint=True)
    assert "scores of the reference" not in capsys.readouterr().out
    assert steps(tmp_path, "eval_metrics.jsonl") == [0]


def test_memory_is_released_every_so_many_steps(tmp_path, monkeypatch):
    released = []
    monkeypatch.setattr("rlhf.ppo.trainer.clear_cache", lambda _: released.append(run.state.global_step))
    run = trainer(tmp_path, max_steps=5, torch_empty_cache_steps=2)
    run.train()
    assert released == [2, 4]
    released.clear()
    run = trainer(tmp_path / "never", max_steps=2)
    run.train()
    assert released == []


def test_several_evaluation_sets_have_their_own_names(tmp_path):
    run = trainer(tmp_path, given={"eval_dataset": {"easy": UNSEEN[:2], "hard": UNSEEN[2:]}})
    found = run.evaluate()
    assert {name.split("/")[0] for name in found} == {"eval_easy", "eval_hard"}
    assert found == run.evaluate()  # the same random numbers each time
    whole = run.evaluate(UNSEEN)
    assert whole["eval/scores"] == pytest.approx(
        0.4 * found["eval_easy/scores"] + 0.6 * found["eval_hard/scores"], abs=1e-5
    )


def test_completions_over_the_whole_set_and_over_one_batch(tmp_path):
    run = trainer(tmp_path, given={"eval_dataset": UNSEEN}, per_device_eval_batch_size=3)
    rows = run.generate_completions()
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in UNSEEN]
    assert {"response", "score"} <= set(rows[0])
    assert [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()] == rows
    assert run.generate_completions(sampling=True) == rows[:3]


def test_without_an_evaluation_set_it_says_so(tmp_path):
    run = trainer(tmp_path)
    for call in (run.evaluate, run.generate_completions):
        with pytest.raises(UserError, match="eval_dataset: pass one"):
            call()


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({"save_strategy": "steps", "save_steps": 1}, [1, 2, 3, 4]),
        ({"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}, [3, 4]),
        ({"save_strategy": "steps", "save_steps": 3}, [3, 4]),
        ({"save_strategy": "epoch"}, [2, 4]),
        ({"save_strategy": "no"}, []),
    ],
)
def test_checkpoints_are_kept_as_asked_for(tmp_path, options, saved):
    trainer(tmp_path, **options).train()
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{n}" for n in saved]


def test_resume_from_the_newest_and_without_one(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=True)
    assert steps(tmp_path) == [1, 2, 3, 4]
    with pytest.raises(UserError, match="there are no checkpoints in"):
        trainer(tmp_path / "none").train(resume_from_checkpoint=True)


def test_tensorboard_has_scalars_texts_and_settings(tmp_path):
    run = trainer(tmp_path, given={"eval_dataset": UNSEEN}, report_to="tensorboard", eval_strategy="epoch", max_steps=2)
    run.train()
    (folder,) = {path.parent for path in (tmp_path / "tensorboard").glob("events*")}
    seen = EventAccumulator(str(folder)).Reload()
    rows = metrics(tmp_path)
    for name in ("objective/kl_per_token", "objective/scores", "lr", "value/explained_variance"):
        tag = "progress/lr" if name == "lr" else name
        assert [(e.step, pytest.approx(e.value, abs=1e-5)) for e in seen.Scalars(tag)] == [
            (r["step"], r[name]) for r in rows
        ]
    assert [e.step for e in seen.Scalars("eval/scores")] == [2]
    assert any(tag.startswith("samples/0") for tag in seen.Tags()["tensors"])


def test_the_data_order_follows_data_seed_and_sampling_does_not(tmp_path):
    orders = []
    for i, options in enumerate([{}, {"data_seed": 5}, {"data_seed": 6}]):
        run = trainer(tmp_path / str(i), max_steps=1, **options)
        run.collect = lambda step, batch, collect=run.collect: (
            orders.append([p.prompt_id for p in batch]),
            collect(step, batch),
        )[1]
        run.train()
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("options", [{"eval_strategy": "steps", "eval_steps": 2}, {"eval_on_start": True}])
def test_evaluations_without_an_evaluation_set_are_refused_before_training(tmp_path, options):
    with pytest.raises(UserError, match=f"^eval_dataset: {next(iter(options))} needs one"):
        trainer(tmp_path, **options)


def test_a_schedule_that_follows_a_metric_is_refused(tmp_path):
    weights = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    given = {"optimizers": (weights, torch.optim.lr_scheduler.ReduceLROnPlateau(weights))}
    with pytest.raises(UserError, match=r"^optimizers: expected .*found ReduceLROnPlateau"):
        trainer(tmp_path, given=given)


def test_the_schedule_has_the_options_it_was_given(tmp_path):
    """Half a cosine from 1 down to a tenth, over four steps, by hand."""
    options = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    trainer(tmp_path, max_steps=4, **options).train()
    # min + (1 - min) * (1 + cos(pi * t)) / 2 at t = 0, 1/4, 1/2, 3/4
    expected = [1.0, 0.1 + 0.9 * 0.853553, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * 0.146447]
    assert [row["lr"] / 1e-3 for row in metrics(tmp_path)] == pytest.approx(expected, abs=1e-5)


def test_completions_do_not_depend_on_the_temperature_of_training(tmp_path):
    run = trainer(tmp_path, given={"eval_dataset": UNSEEN[:2]})
    cold = run.generate_completions()
    run.args.temperature = 9.0
    assert [row["response"] for row in run.generate_completions()] == [row["response"] for row in cold]


def test_an_evaluation_is_the_same_in_batches_of_any_size(tmp_path):
    run = trainer(tmp_path, given={"eval_dataset": UNSEEN})
    whole = run.evaluate()
    for size in (1, 2):
        run.args.per_device_eval_batch_size = size
        assert run.evaluate() == pytest.approx(whole, abs=1e-5)


def test_samples_are_shown_of_the_first_step_and_so_many_times(tmp_path):
    trainer(tmp_path, max_steps=5, num_sample_generations=2, num_ppo_epochs=1).train()
    assert sorted(set(steps(tmp_path, "samples.jsonl"))) == [1, 3]


def test_what_a_function_logs_takes_no_columns_place_and_filler_rows_are_not_shown():
    rollout = SimpleNamespace(
        raw_score=torch.tensor([1.5, -2.0, 0.0]),
        prompts=[SimpleNamespace(prompt_id=f"p{i}", text=f"say {i}") for i in range(3)],
        responses=[[5, 6], [7], [8]],
        logged=Logged(columns={"score": [9, 9], "grade": ["a", "b"]}),
    )
    assert sample_rows(rollout, str, 2) == [
        {"grade": "a", "prompt_id": "p0", "prompt": "say 0", "response": "[5, 6]", "score": 1.5},
        {"grade": "b", "prompt_id": "p1", "prompt": "say 1", "response": "[7]", "score": -2.0},
    ]


def test_an_evaluation_asked_for_has_the_prefix_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.ppo.trainer.evaluate", lambda _, rows, prefix: {f"{prefix}/n": float(len(rows))})
    run = trainer(tmp_path, given={"eval_dataset": {"a": PROMPTS[:2], "b": PROMPTS[:1]}}, max_steps=2)
    assert run.evaluate(metric_key_prefix="test") == {"test_a/n": 2.0, "test_b/n": 1.0}
    assert run.evaluate(PROMPTS[:3], "test") == {"test/n": 3.0}
    assert run.evaluate(PROMPTS[:3]) == {"eval/n": 3.0}


def test_episodes_and_epochs_count_responses(tmp_path):
    """Seven prompts, four a step: the last step of an epoch has three."""
    run = trainer(tmp_path, max_steps=3, num_ppo_epochs=1)
    run.train()
    rows = [(row["step"], row["episode"], row["epoch"]) for row in metrics(tmp_path)]
    assert rows == [(1, 4, pytest.approx(4 / 7)), (2, 7, 1.0), (3, 11, pytest.approx(11 / 7))]
    assert run.state.epoch == pytest.approx(11 / 7)


def test_a_stop_saves_the_step_unless_it_is_saved_or_the_last(tmp_path):
    saved, run = [], trainer(tmp_path, max_steps=3)
    run.episode = 8
    run.checkpoints = SimpleNamespace(saver=SimpleNamespace(step=1), save=lambda *place: saved.append(place))
    for step, stopped in ((1, True), (2, True), (3, False)):
        run._stop(step)
        assert run.stopped == stopped
    assert saved == [(2, 8)]


def test_what_a_callback_answers_is_what_the_next_one_and_the_run_see():
    answer, seen = TrainerControl(should_training_stop=True), []

    class Answers(TrainerCallback):
        def on_log(self, args, state, control, **shown):
            return answer

    class Looks(TrainerCallback):
        def on_log(self, args, state, control, **shown):
            seen.append((control, shown))

    callbacks = Callbacks(None, [Answers, Looks()], True, model="policy")
    callbacks.event("on_log", logs={"a": 1.0})
    assert seen == [(answer, {"model": "policy", "logs": {"a": 1.0}})]
    assert callbacks.control is answer
    assert callbacks.listens("on_log")
    assert not callbacks.listens("on_save")


def test_callbacks_see_where_a_resumed_run_begins():
    args = SimpleNamespace(per_device_train_batch_size=3, logging_steps=5, eval_steps=5, save_steps=5)
    callbacks = Callbacks(args, [], True)
    before = callbacks.control = TrainerControl(should_training_stop=True)
    callbacks.event = lambda name: None
    callbacks.begin(3, 7, 2)
    state = callbacks.state
    assert (state.global_step, state.max_steps, state.epoch, state.num_train_epochs) == (3, 7, 1.5, 4)
    assert (state.train_batch_size, state.logging_steps) == (3, 5)
    assert callbacks.control is not before
    assert not callbacks.control.should_training_stop


def test_responses_that_are_not_finite_are_counted(tmp_path):
    def bad(completions, **_):
        return [float("inf"), 1.0, float("inf"), 2.0][: len(completions)]

    run = trainer(tmp_path, reward=bad, given={"eval_dataset": UNSEEN[:4]})
    found = run.evaluate()
    assert (found["eval/not_finite"], found["eval/scores"]) == (2.0, 1.5)
