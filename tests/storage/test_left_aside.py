"""Checkpoints after the one that a run resumes from are renamed, and deleted in the end."""

import pytest
from test_checkpoint import checkpoint, names
from tiny_ppo import metrics, trainer

from rlhf.storage.checkpoint import PPO, checkpoints, set_later_aside
from rlhf.storage.disk import fault, write_manifest


def test_later_checkpoints_are_renamed_and_the_last_of_a_step_stays(tmp_path):
    checkpoint(tmp_path, "step-1")
    for n in range(3):
        (checkpoint(tmp_path, "step-2", manifest=False) / "mark").write_text(str(n))
        write_manifest(tmp_path / "step-2")
        set_later_aside(tmp_path, PPO, 1)
    assert names(tmp_path) == ["left-step-2", "step-1"]
    assert (tmp_path / "left-step-2" / "mark").read_text() == "2"


def test_a_broken_checkpoint_takes_no_whole_ones_place_aside(tmp_path):
    checkpoint(tmp_path, "left-step-2")
    checkpoint(tmp_path, "step-2", manifest=False)
    set_later_aside(tmp_path, PPO, 1)
    assert names(tmp_path) == ["left-step-2"]
    assert fault(tmp_path / "left-step-2") is None


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (None, ["left-step-2", "left-step-3", "left-step-8", "left-step-9"]),
        (1, ["left-step-3"]),  # those of the last time come first
        (2, ["left-step-2", "left-step-3"]),
        (3, ["left-step-2", "left-step-3", "left-step-9"]),
    ],
)
def test_the_limit_holds_for_what_was_set_aside(tmp_path, limit, kept):
    for name in ("left-step-8", "left-step-9", "step-1", "step-2", "step-3"):
        checkpoint(tmp_path, name)
    set_later_aside(tmp_path, PPO, 1, limit)
    assert names(tmp_path) == [*kept, "step-1"]


def test_the_only_whole_one_stays_where_a_run_begins_anew(tmp_path):
    checkpoint(tmp_path, "left-step-1")
    checkpoint(tmp_path, "step-2", manifest=False)
    set_later_aside(tmp_path, PPO, 0, 1)
    assert names(tmp_path) == ["left-step-1", "left-step-2"]
    write_manifest(tmp_path / "left-step-2")
    set_later_aside(tmp_path, PPO, 0, 1)
    assert names(tmp_path) == ["left-step-2"]


def test_of_two_broken_ones_the_later_one_stays(tmp_path):
    for name in ("left-step-2", "step-2"):
        (checkpoint(tmp_path, name, manifest=False) / "mark").write_text(name)
    set_later_aside(tmp_path, PPO, 1)
    assert (tmp_path / "left-step-2" / "mark").read_text() == "step-2"


def test_broken_ones_go_where_a_run_resumes_from_a_whole_one(tmp_path):
    checkpoint(tmp_path, "step-1")
    for step in (2, 3):
        checkpoint(tmp_path, f"step-{step}", manifest=False)
    set_later_aside(tmp_path, PPO, 1, 1)
    assert names(tmp_path) == ["left-step-3", "step-1"]


def test_a_run_that_goes_on_from_an_earlier_step_leaves_its_later_ones(tmp_path):
    """The limit does not delete the run's own newest checkpoint, and the next start finds it."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, **options).train()
    cut = trainer(tmp_path, **options | {"max_steps": 3}, save_total_limit=1)
    cut.train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-2")
    assert [path.name for path in checkpoints(tmp_path)] == ["step-3"]
    assert (tmp_path / "checkpoints" / "left-step-4").is_dir()
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
