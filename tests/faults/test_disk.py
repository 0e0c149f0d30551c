"""A full or a read-only disk costs one line; the checkpoint before stays whole, and with room again the run goes on."""

import shutil
import subprocess

import pytest
from points import fill, read_only, writable
from trials import trial

from rlhf.storage.checkpoint import PPO, REWARD, newest_whole, numbered, problem_of

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
            assert f"step-{call}: cannot write the checkpoint: " in error
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
        pages = [path for path in left if path.parent.name != "logs"]
        assert not [path for path in pages if path.name.startswith(("report.", "."))]
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


@pytest.fixture
def read_only_here(tmp_path):
    """Skips where a folder cannot be made so; makes all writable again."""
    folder = tmp_path / "probe"
    folder.mkdir()
    try:
        read_only(folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a folder cannot be mounted read-only here: {error.stderr.decode().strip()}")
    finally:
        writable(folder)
    yield
    writable(tmp_path / "run")


@pytest.mark.parametrize(
    ("recipe", "phase", "call"),
    [
        ("ppo_full", "save", 3),
        pytest.param("ppo_full", "log", 3, marks=pytest.mark.slow),
        pytest.param("ppo_full", "model", 1, marks=pytest.mark.slow),
        pytest.param("reward_stage", "seal", 2, marks=pytest.mark.slow),
    ],
)
def test_a_folder_that_becomes_read_only(campaign, read_only_here, tmp_path, recipe, phase, call):
    """What is whole by then stays, and once it can be written again the run goes on from there."""
    campaign.reference(recipe)
    prefix = PPO if recipe == "ppo_full" else REWARD
    stage = campaign.stage(recipe, tmp_path)
    with trial(f"read-only from {phase} on"):
        fault = {"phase": phase, "call": call, "read_only": str(tmp_path / "run")}
        error = only_error(*campaign.run(recipe, tmp_path, fault))
        assert "Read-only file system" in error or "Permission denied" in error
        writable(tmp_path / "run")
        kept = newest_whole(stage / "checkpoints" if prefix == PPO else stage, prefix)
        # Step 2's checkpoint is completed in the background: by the log of step 3 it may be whole, or not yet.
        whole = {"save": ["step-2"], "log": ["step-1", "step-2"], "model": ["step-4"], "seal": ["checkpoint-1"]}
        assert kept.name in whole[phase]
        campaign.finish(recipe, tmp_path)
