"""Checkpoint files that were cut, changed, lost or swapped are never loaded; a clock set back misleads nobody."""

import os
import shutil
import signal
import time

import pytest
from trials import trial

from rlhf.storage.checkpoint import PPO, REWARD, newest_whole, numbered

YEAR = 365 * 24 * 3600


def truncate(path, other):
    os.truncate(path, path.stat().st_size // 2)


def flip(path, other):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose(path, other):
    path.unlink()


def swap(path, other):
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def lengthen(path, other):
    with path.open("ab") as file:
        file.write(b"0")


DAMAGES = [truncate, flip, lose, swap, lengthen]


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def stopped(campaign, tmp_path_factory):
    """A run of each stage that was stopped at its third step, with checkpoints 2 and 3."""
    folder = tmp_path_factory.mktemp("stopped")
    # The signal comes in step 3 of PPO; at the end of step 2 of the reward stage, so that step 3 is its last.
    for recipe, phase, call in (("ppo_full", "learn", 3), ("reward_stage", "seal", 2)):
        code, said = campaign.run(recipe, folder / recipe, {"phase": phase, "call": call, "signal": signal.SIGTERM})
        assert code == 0, said[-3000:]
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_is_checked(stopped, tmp_path, capsys, damage):
    shutil.copytree(stopped / "ppo_full" / "run" / "ppo_full" / "checkpoints", tmp_path / "all")
    older, newest = numbered(tmp_path / "all", PPO)
    assert (older.name, newest.name) == ("step-2", "step-3")
    assert newest_whole(tmp_path / "all", PPO) == newest
    names = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    assert {"manifest.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl", "step.json"} <= set(names)
    for name in names:
        other = older / name if (older / name).exists() else older / "step.json"  # what the third step warned of
        same = (newest / name).read_bytes() == other.read_bytes()
        if damage is swap and (same or name == "manifest.json"):
            continue
        shutil.rmtree(newest)
        shutil.copytree(stopped / "ppo_full" / "run" / "ppo_full" / "checkpoints" / newest.name, newest)
        spare = tmp_path / "spare"
        shutil.copyfile(other, spare)
        with trial(f"checkpoint file: {damage.__name__}"):
            damage(newest / name, spare)
            assert newest_whole(tmp_path / "all", PPO) == older
            (line,) = capsys.readouterr().out.splitlines()
            assert line.startswith(f"! skipped {newest}: broken checkpoint, found ")
            assert name in line or name == "manifest.json"  # a digit of a digest in it, say
            assert line.endswith("; resuming from step-2")


@pytest.mark.parametrize("damage", [truncate, *(pytest.param(d, marks=pytest.mark.slow) for d in (flip, swap))])
def test_a_run_goes_on_from_the_one_before(campaign, stopped, tmp_path, damage):
    shutil.copytree(stopped / "ppo_full", tmp_path, dirs_exist_ok=True)
    older, newest = numbered(campaign.stage("ppo_full", tmp_path) / "checkpoints", PPO)
    with trial(f"checkpoint file: {damage.__name__}, resumed"):
        damage(
            newest / "model.safetensors", older / "optimizer.bin" if damage is not swap else newest / "optimizer.bin"
        )
        said = campaign.finish("ppo_full", tmp_path)
        assert said.count("broken checkpoint, found") == 1
        assert (newest.parent / "left-step-3").is_dir()  # nothing is thrown away


def test_folders_that_changed_names_are_told_apart(campaign, stopped, tmp_path):
    shutil.copytree(stopped / "ppo_full", tmp_path, dirs_exist_ok=True)
    older, newest = numbered(campaign.stage("ppo_full", tmp_path) / "checkpoints", PPO)
    with trial("checkpoint folders swapped"):
        newest.rename(newest.with_name("x"))
        older.rename(newest)
        newest.with_name("x").rename(older)
        before = tree(tmp_path / "run" / "ppo_full" / "checkpoints")
        code, said = campaign.run("ppo_full", tmp_path)
        assert code == 2
        assert f"error: {newest}: broken checkpoint, found step 2 in it; 1 older checkpoints are broken, too" in said
        assert tree(tmp_path / "run" / "ppo_full" / "checkpoints") == before


@pytest.mark.parametrize("recipe", ["ppo_full", "reward_stage"])
def test_all_broken_is_one_line_and_nothing_is_deleted(campaign, stopped, tmp_path, recipe):
    shutil.copytree(stopped / recipe, tmp_path, dirs_exist_ok=True)
    stage = campaign.stage(recipe, tmp_path)
    weights = [path for path in stage.rglob("model.safetensors") if path.parent != stage]
    assert len(weights) in (1, 2)
    with trial("all checkpoints broken"):
        for path in weights:
            flip(path, None)
        before = {path: content for path, content in tree(stage).items() if path.name != "run.json"}
        code, said = campaign.run(recipe, tmp_path)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2
        assert len(errors) == 1
        assert "Traceback" not in said
        assert "model.safetensors with other content than was written" in errors[0]
        assert {path: content for path, content in tree(stage).items() if path.name != "run.json"} == before


def test_a_reward_checkpoint_that_is_broken_is_passed_over(campaign, stopped, tmp_path):
    campaign.reference("reward_stage")
    shutil.copytree(stopped / "reward_stage", tmp_path, dirs_exist_ok=True)
    stage = campaign.stage("reward_stage", tmp_path)
    kept = numbered(stage, REWARD)[-1]
    later = stage / "checkpoint-4"
    shutil.copytree(kept, later)  # as if it had been written next, and half of it only
    with trial("reward checkpoint broken"):
        (later / "manifest.json").unlink()
        said = campaign.finish("reward_stage", tmp_path)
        assert said.count(f"skipped {later}: broken checkpoint, found no manifest.json") == 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ppo_full", "reward_stage"])
def test_the_clock_is_set_back(campaign, stopped, tmp_path, recipe):
    shutil.copytree(stopped / recipe, tmp_path, dirs_exist_ok=True)
    with trial("clock set back by a year"):
        ahead = time.time()
        for n, path in enumerate(sorted(tmp_path.rglob("*"), reverse=True)):
            os.utime(path, (ahead - n * 1000, ahead - n * 1000))  # the newest checkpoint seems the oldest
        phase = "seal" if recipe == "reward_stage" else "learn"
        stopping = {"clock": YEAR, "phase": phase, "call": 1, "signal": signal.SIGTERM}
        code, said = campaign.run(recipe, tmp_path, stopping)
        assert code == 0, said[-3000:]
        campaign.finish(recipe, tmp_path)
