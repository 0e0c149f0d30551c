"""A full or a read-only disk costs one line; the checkpoint before stays whole, and with room again the run goes on."""

import shutil
import subprocess

import pytest
from conftest import trial
from points import fill

from rlhf.runtime.checkpoint import PPO, numbered, problem_of

SIZE = "size=6m"


def only_error(code, said):
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2, said[-3000:]
    assert len(errors) == 1, said[-3000:]
    assert "Traceback" not in said
    return errors[0]


@pytest.mark.parametrize(
    ("phase", "call", "leave"),
    [
        ("save", 2, 100_000),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("save", 3, 300_000),
                ("save", 4, 500_000),
                ("log", 3, 0),
                ("model", 1, 0),
            ]
        ),
    ],
)
def test_ppo_on_a_full_disk(campaign, disk, phase, call, leave):
    campaign.reference("ppo_full")
    where = disk(SIZE)
    checkpoints = campaign.stage("ppo_full", where) / "checkpoints"
    with trial(f"full disk, {phase}"):
        fault = {"phase": phase, "call": call, "fill": str(where), "leave": leave}
        error = only_error(*campaign.run("ppo_full", where, fault))
        assert "No space left on device" in error or "MB are free" in error
        kept = numbered(checkpoints, PPO)
        assert kept
        assert [problem_of(path) for path in kept] == [None] * len(kept)
        assert not list(checkpoints.glob(".*"))
        if phase == "save":
            assert f"step-{call}: expected to write a checkpoint there, found: " in error
            assert kept[-1].name == f"step-{call - 1}"
            assert error.endswith(f"kept: {', '.join(path.name for path in kept)}")
        if phase == "model":
            assert not (checkpoints.parent / "config.json").exists()
        (where / "filler").unlink()
        campaign.finish("ppo_full", where)


@pytest.mark.slow
@pytest.mark.parametrize("leave", [0, 200_000])
def test_the_reward_stage_on_a_full_disk(campaign, disk, tmp_path, leave):
    campaign.reference("reward_stage")
    where = disk(SIZE)
    with trial("full disk, reward"):
        # After the first checkpoint has got its manifest: the second one does not fit.
        fault = {"phase": "seal", "call": 1, "fill": str(where), "leave": leave}
        error = only_error(*campaign.run("reward_stage", where, fault))
        assert "checkpoint-" in error or "No space left" in error
        (where / "filler").unlink()
        campaign.finish("reward_stage", where)


@pytest.mark.slow
def test_a_report_on_a_full_disk(campaign, disk):
    campaign.reference("ppo_full")
    where = disk(SIZE)
    shutil.copytree(campaign.folder / "reference_ppo_full" / "run", where / "run")
    before = sorted(where.rglob("*"))
    with trial("full disk, report"):
        fill(where, 20_000)
        options = ["--run", "run", "--runs_dir", where]
        only_error(*campaign.forge.run("report", options, campaign.new_log()))
        (where / "filler").unlink()
        left = [path for path in sorted(where.rglob("*")) if path not in before and path.is_file()]
        assert not [path for path in left if path.name.startswith("report.") or path.name.startswith(".")]
        code, said = campaign.forge.run("report", options, campaign.new_log())
        assert code == 0, said[-3000:]
        assert (where / "run" / "report" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ppo_full", "reward_stage"])
def test_a_read_only_folder(campaign, disk, recipe):
    campaign.reference(recipe)
    where = disk(SIZE)
    with trial("read-only folder"):
        subprocess.run(["mount", "-o", "remount,ro", str(where)], check=True, capture_output=True)
        error = only_error(*campaign.run(recipe, where))
        assert "Read-only file system" in error
        assert list(where.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,rw", str(where)], check=True, capture_output=True)
        campaign.finish(recipe, where)
