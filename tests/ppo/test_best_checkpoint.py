"""The best checkpoint by an evaluation's metric: it is kept, its weights are loaded at the end, also after a resume."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from tiny_ppo import PROMPTS, trainer
from transformers import TrainerCallback

from rlhf.errors import UserError
from rlhf.ppo.checkpointing import Checkpoints
from rlhf.ppo.evaluation import check_metric

BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
BEST |= {"eval_strategy": "steps", "eval_steps": 1, "num_ppo_epochs": 1}


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.roles.trained.parameters()]).clone()


class Weights(TrainerCallback):
    """The trained weights at each evaluation."""

    def __init__(self):
        self.seen = {}

    def on_evaluate(self, args, state, control, **shown):
        self.seen[state.global_step] = weights(self.run)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train, with these scores of the evaluations; returns the trainer and the weights at each."""

    def run(scores, **options):
        left = list(scores)
        monkeypatch.setattr("rlhf.ppo.trainer.evaluate", lambda _, __, prefix: {f"{prefix}/scores": left.pop(0)})
        resume = options.pop("resume", False)
        seen = Weights()
        seen.run = trainer(tmp_path, given={"eval_dataset": PROMPTS[:2], "callbacks": [seen]}, **BEST | options)
        seen.run.train(resume_from_checkpoint=resume)
        return seen.run, seen.seen

    return run


def kept(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("options", "best"),
    [
        ({}, 2),
        ({"metric_for_best_model": "eval/scores", "greater_is_better": False}, 3),
        ({"metric_for_best_model": "scores", "load_best_model_at_end": False}, 4),
    ],
)
def test_the_weights_of_the_best_checkpoint_are_loaded_at_the_end(train, tmp_path, options, best):
    run, seen = train([0.5, 0.9, 0.1, 0.2], max_steps=4, **options)
    assert not torch.equal(seen[best], seen[best - 1])
    assert torch.equal(weights(run), seen[best])
    assert kept(tmp_path) == sorted({f"step-{run.state.best_global_step}", "step-4"})


@pytest.mark.parametrize("greater", [True, False])
def test_of_two_that_are_equal_the_first_is_the_best(train, greater):
    scores = [0.5, 0.9, 0.9] if greater else [0.5, 0.1, 0.1]
    run, _ = train(scores, max_steps=3, metric_for_best_model="eval_scores", greater_is_better=greater)
    assert (run.state.best_global_step, run.state.best_metric) == (2, scores[1])


def test_a_resumed_run_remembers_the_best(train, tmp_path):
    train([0.9, 0.1], max_steps=2)
    before, _ = train([0.2, 0.3], max_steps=4, resume=True)
    assert (before.state.best_global_step, before.state.best_metric) == (1, 0.9)
    assert kept(tmp_path) == ["step-1", "step-4"]


@pytest.mark.parametrize("why", ["damaged", "other metric"])
def test_a_best_checkpoint_that_no_longer_counts_is_forgotten(train, tmp_path, why, capsys):
    train([0.9, 0.1], max_steps=2)
    options = {"metric_for_best_model": "eval/scores", "greater_is_better": True}
    if why == "damaged":
        (tmp_path / "checkpoints" / "step-1" / "step.json").write_text("{}")
        options = {}
    run, seen = train([0.2, 0.3], max_steps=4, resume=True, **options)
    assert "step-1: no longer the best checkpoint" in " ".join(capsys.readouterr().out.split())
    assert run.state.best_global_step == 4
    assert torch.equal(weights(run), seen[4])


def test_reward_minus_kl_chooses(tmp_path):
    options = BEST | {"metric_for_best_model": "eval_rlhf_reward", "kl_coef": 0.5, "max_steps": 3}
    run = trainer(tmp_path, given={"eval_dataset": PROMPTS[:3]}, learning_rate=3e-3, **options)
    run.train()
    rows = {row["step"]: row for row in run.state.log_history if "eval/scores" in row}
    by_hand = {step: row["eval/scores"] - 0.5 * row["eval/kl"] for step, row in rows.items()}
    assert by_hand == pytest.approx({step: row["eval/rlhf_reward"] for step, row in rows.items()})
    assert run.state.best_global_step == max(by_hand, key=by_hand.get)
    assert run.evaluate()["eval/rlhf_reward"] == pytest.approx(run.state.best_metric, abs=1e-5)


def test_an_unknown_metric_is_refused_at_the_start(tmp_path):
    options = BEST | {"metric_for_best_model": "eval_score", "greater_is_better": True}
    with pytest.raises(UserError, match=r"metric_for_best_model: expected one of .*did you mean 'eval_scores'"):
        trainer(tmp_path, given={"eval_dataset": PROMPTS[:3]}, **options)


def test_the_metrics_of_several_sets_are_named_after_them():
    for wanted in ("eval_short_scores", "eval_long/rewards/judge/mean", "long_rlhf_reward", "short/not_finite", None):
        check_metric(wanted, ["judge"], ["short", "long"])
    for wanted in ("eval_scores", "scores", "short_rewards_other_mean", "eval_other_scores"):
        with pytest.raises(UserError, match=rf"expected one of eval_long_.*eval_short_scores.*, found '{wanted}'"):
            check_metric(wanted, ["judge"], ["short", "long"])
    check_metric("eval_scores", ["judge"], [""])


class StopIn(TrainerCallback):
    def on_step_begin(self, args, state, *_, **__):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stops", [True, False])
def test_a_run_that_was_told_to_stop_loads_no_best_weights_and_is_not_pushed_as_ended(tmp_path, monkeypatch, stops):
    scores, pushed = [0.9, 0.1], []
    monkeypatch.setattr("rlhf.ppo.trainer.evaluate", lambda _, __, prefix: {f"{prefix}/scores": scores.pop(0)})
    given = {"eval_dataset": PROMPTS[:2], "callbacks": [StopIn()] if stops else []}
    options = {"push_to_hub": True, "hub_strategy": "every_save" if stops else "end"}
    run = trainer(tmp_path, given=given, max_steps=3 if stops else 2, **BEST | options)
    monkeypatch.setattr(run, "push_to_hub", lambda message="at its end": pushed.append(message))
    loaded = []
    monkeypatch.setattr(run.checkpoints, "load_best", lambda: loaded.append("best") or "")
    run.train()
    assert run.stopped == stops
    assert loaded == ([] if stops else ["best"])
    assert pushed == (["Step 1", "Step 2"] if stops else ["at its end"])


def test_without_an_evaluated_checkpoint_the_last_weights_stay_and_a_broken_one_is_named(tmp_path):
    checkpoints, state = object.__new__(Checkpoints), SimpleNamespace(best_global_step=None)
    checkpoints.callbacks, checkpoints.folder = SimpleNamespace(state=state), tmp_path
    assert checkpoints.load_best() == "load_best_model_at_end: no checkpoint was evaluated, the last weights stay"
    state.best_global_step = 2
    with pytest.raises(UserError, match=r"step-2: broken, found .*; run again to keep the last weights instead$"):
        checkpoints.load_best()
