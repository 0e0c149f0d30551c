"""A resumed reward run logs what an uninterrupted one logs, whatever happened to its files since the checkpoint."""

import json
import math
import os
import signal
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from test_reward_nonfinite import strict, train  # noqa: F401  a fixture

from rlhf.errors import UserError
from rlhf.reward.manifest_callback import ManifestCallback, step_facts
from rlhf.reward.nonfinite import Losses
from rlhf.reward.trainer import PreferenceTrainer, _problem, _resumable
from rlhf.storage.checkpoint import problem_of, write_step
from rlhf.storage.disk import write_manifest


def timeless(path):
    return [{k: v for k, v in row.items() if not k.endswith(("runtime", "per_second"))} for row in strict(path)]


def stop(loss):
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


def test_means_go_on_in_the_middle_of_a_row(train):  # noqa: F811
    """Rows at steps 3, 6, ...; the interruption is after step 5, and step 4 was skipped."""
    options = {"num_train_epochs": 2, "logging_steps": 3, "eval_steps": 4, "save_total_limit": 9}
    bad = {4: lambda loss: loss * math.nan}
    whole, _ = train("whole", bad, **options)
    train("cut", bad | {5: stop}, **options)
    folder, other = train.folder / "whole", train.folder / "cut"
    assert (other / "checkpoint-5" / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert "metrics.jsonl" in (other / "checkpoint-5" / "manifest.json").read_text()
    # Rows lost, half a row, and one of a step that is yet to come, as a crash may leave them.
    kept = (other / "metrics.jsonl").read_text().splitlines()[:1]
    (other / "metrics.jsonl").write_text("\n".join([*kept, '{"step": 7, "loss": 0.5}', '{"step": 6, "lo']))
    (other / "skipped.jsonl").unlink()
    again, _ = train("cut", **options)
    assert again.state.global_step == whole.state.global_step == 8
    assert timeless(other / "metrics.jsonl") == timeless(folder / "metrics.jsonl")
    assert strict(other / "skipped.jsonl") == strict(folder / "skipped.jsonl")
    rows = timeless(folder / "metrics.jsonl")
    assert [(row["step"], row["skipped_updates"]) for row in rows if "loss" in row] == [(3, 0), (6, 1)]
    assert rows[-1]["train_loss"] > 0
    assert rows[-1]["total_flos"] > 0


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.bin", "optimizer_0", "latest"])
def test_states_of_an_optimizer_are_known_by_the_names_of_each_engine(tmp_path, name):
    (tmp_path / "model.safetensors").touch()
    assert not _resumable(tmp_path)
    (tmp_path / name).mkdir()
    assert _resumable(tmp_path)


def test_a_run_that_saves_only_models_resumes_where_it_was_told_to_stop(train):  # noqa: F811
    options = {"num_train_epochs": 2, "logging_steps": 3, "eval_steps": 4, "save_only_model": True}
    train("whole", {}, **options)
    cut, _ = train("cut", {5: stop}, **options)
    assert cut.state.global_step == 5
    assert (train.folder / "cut" / "checkpoint-5" / "optimizer.pt").is_file()  # without, it would begin anew
    again, _ = train("cut", **options)
    assert again.state.global_step == 8
    assert timeless(train.folder / "cut" / "metrics.jsonl") == timeless(train.folder / "whole" / "metrics.jsonl")


def test_what_it_sets_aside_is_within_the_limit(train):  # noqa: F811
    options = {"eval_steps": 1, "save_total_limit": 9}
    train("cut", **options)
    folder = train.folder / "cut"
    for step in (2, 3, 4):
        (folder / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"broken")
    train("cut", **options | {"save_total_limit": 2})
    assert sorted(path.name for path in folder.glob("left-*")) == ["left-checkpoint-3", "left-checkpoint-4"]


@pytest.mark.parametrize("key", ["tokens", "losses", "metrics"])
@pytest.mark.parametrize("value", [None, "x"])
def test_a_step_file_that_lacks_something_is_a_broken_checkpoint(train, key, value):  # noqa: F811
    train("cut", {2: stop})
    made = train.folder / "cut" / "checkpoint-2"
    facts = json.loads((made / "step.json").read_text())
    del facts[key]
    (made / "step.json").write_text(json.dumps(facts | ({key: value} if value else {})))
    write_manifest(made)
    expected = r"checkpoint-2: broken checkpoint, found a step\.json that cannot be read; move them away"
    with pytest.raises(UserError, match=expected):
        train("cut")
    assert made.is_dir()


def test_damage_of_the_best_checkpoint_is_damage_of_those_after_it(tmp_path):
    """At the end its weights are loaded."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("w")
        facts = {
            "batch_size": 2,
            "engine": "NO",
            "processes": 1,
            "tokens": 0,
            "losses": asdict(Losses()),
            "metrics": {},
        }
        write_step(folder, step, facts)
        state = {"best_model_checkpoint": "elsewhere/checkpoint-1"}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        write_manifest(folder)
    assert _problem(tmp_path / "checkpoint-2") is None
    (tmp_path / "checkpoint-1/weights").write_text("x")
    assert _problem(tmp_path / "checkpoint-2").startswith("the best before it, checkpoint-1, with ")


def test_the_best_checkpoint_of_a_run_that_was_moved_is_where_it_is_now(tmp_path):
    args = SimpleNamespace(save_total_limit=3, output_dir=str(tmp_path))
    for before, now in (("/before/checkpoint-3", str(tmp_path / "checkpoint-3")), (None, None)):
        state = SimpleNamespace(best_model_checkpoint=before)
        ManifestCallback(args).on_train_begin(args, state, None)
        assert state.best_model_checkpoint == now


def test_the_batch_of_a_checkpoint_is_what_all_processes_read_for_an_update(monkeypatch):
    monkeypatch.setattr("rlhf.reward.manifest_callback.run_facts", lambda accelerator: {"engine": "FSDP"})
    args = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=3, per_device_eval_batch_size=7)
    assert step_facts(SimpleNamespace(num_processes=5), args) == {"batch_size": 30, "engine": "FSDP"}


def test_a_checkpoint_is_completed_and_the_best_one_is_never_over_the_limit(tmp_path):
    args = SimpleNamespace(save_total_limit=1, output_dir=str(tmp_path))
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with ManifestCallback(args) as manifests:
        assert args.save_total_limit is None  # the trainer would delete too early
        manifests.facts = lambda: {"batch_size": 2, "engine": "NO", "processes": 1}
        state = SimpleNamespace(global_step=3, best_model_checkpoint="elsewhere/checkpoint-1")
        manifests.on_save(args, state, None)
    assert args.save_total_limit == 1
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    newest = tmp_path / "checkpoint-3"
    assert (newest / "metrics.jsonl").read_text() == "{}\n"
    assert json.loads((newest / "step.json").read_text()) == {"step": 3} | manifests.facts()
    assert problem_of(newest) is None


@pytest.mark.parametrize("full", [True, False])
def test_a_checkpoint_that_could_not_be_written_is_removed(tmp_path, full):
    args = SimpleNamespace(save_total_limit=2, output_dir=str(tmp_path))
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    write_manifest(tmp_path / "checkpoint-1")
    words = r"checkpoint-2: cannot write the checkpoint: disk full .* earlier checkpoints are kept: checkpoint-1$"
    with pytest.raises(UserError if full else ZeroDivisionError, match=words if full else None), ManifestCallback(args):
        raise OSError(28, "disk full") if full else ZeroDivisionError
    assert args.save_total_limit == 2
    names = ["checkpoint-1"] if full else ["checkpoint-1", "checkpoint-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("saved", ["model.safetensors", "latest"])
def test_a_run_that_saved_only_models_begins_anew(train, monkeypatch, saved):  # noqa: F811
    folder, given = train.folder / "cut" / "checkpoint-2", []
    folder.mkdir(parents=True)
    facts = {"batch_size": 4, "engine": "NO", "processes": 1, "tokens": 0, "losses": asdict(Losses()), "metrics": {}}
    write_step(folder, 2, facts)
    (folder / "trainer_state.json").write_text('{"best_model_checkpoint": null}')
    (folder / saved).touch()
    write_manifest(folder)
    monkeypatch.setattr(
        PreferenceTrainer, "train", lambda _, resume_from_checkpoint: given.append(resume_from_checkpoint)
    )
    train("cut", save_only_model=True)
    resumes = saved == "latest"  # the name of DeepSpeed
    assert given == ([str(folder)] if resumes else [None])
    assert folder.exists() == resumes  # else it is set aside
