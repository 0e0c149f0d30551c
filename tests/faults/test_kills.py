"""SIGKILL at any moment, also between any two changes of a file: run again, it ends as if nothing had been."""

import os
import random
import signal
import time
from contextlib import ExitStack

import forge
import psutil
import pytest
from conftest import trial

IN_A_ROW = 3  # kills of one run, each as it goes on from the one before
RUNS = 21  # over 50 kills of PPO
first_quick = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, RUNS))]


def killed_at_a_time(campaign, recipe, where, dice):
    pid = campaign.begin(recipe, where)
    time.sleep(dice.uniform(0, 0.9 * campaign.reference(recipe)["seconds"]))
    os.kill(pid, signal.SIGKILL)
    return campaign.forge.wait(pid)


def killed_at_a_change(campaign, recipe, where, dice):
    at = dice.randint(1, campaign.reference(recipe)["changes"])
    return campaign.run(recipe, where, {"changes_of": str(where), "at": at})[0]


def killed_and_finished(campaign, recipe, where, dice):
    """Half at times, half at changes of files; a time may be after the end of a run that had little left to do."""
    campaign.reference(recipe)
    with ExitStack() as trials:
        for n in range(IN_A_ROW):
            kill = (killed_at_a_time, killed_at_a_change)[(n + dice.randint(0, 1)) % 2]
            code = kill(campaign, recipe, where, dice)
            assert code in (-signal.SIGKILL, 0)
            if code == 0:
                break
            trials.enter_context(trial(f"SIGKILL, {recipe}"))
        campaign.finish(recipe, where)


@pytest.mark.parametrize("seed", first_quick)
def test_ppo_survives_kills(campaign, tmp_path, seed):
    recipe = ("ppo_full", "ppo_lora")[seed % 2]
    killed_and_finished(campaign, recipe, tmp_path, random.Random(f"{recipe} {seed}"))


@pytest.mark.parametrize("seed", first_quick[:2])
def test_the_reward_stage_survives_kills(campaign, tmp_path, seed):
    killed_and_finished(campaign, "reward_stage", tmp_path, random.Random(f"reward {seed}"))


def test_the_lock_of_a_run_that_was_killed_is_taken_over(campaign, tmp_path):
    with trial("lock of a dead process"):
        code, _ = campaign.run("ppo_full", tmp_path, {"phase": "learn", "call": 3, "signal": signal.SIGKILL})
        assert code == -signal.SIGKILL
        lock = campaign.stage("ppo_full", tmp_path) / ".lock"
        assert lock.exists()
        said = campaign.finish("ppo_full", tmp_path)
        assert f"{lock}: taken over from process " in said
        assert not lock.exists()


def test_a_second_run_of_a_stage_is_refused_while_the_first_is_there(campaign, tmp_path):
    expected = campaign.reference("ppo_full")["results"]
    with trial("second run of a stage"):
        stage = campaign.stage("ppo_full", tmp_path)
        first = campaign.begin("ppo_full", tmp_path, {"phase": "learn", "call": 2, "signal": signal.SIGSTOP})
        end = time.monotonic() + 30
        while not (stage / "checkpoints" / "step-1").exists() and time.monotonic() < end:
            time.sleep(0.05)
        before = (stage / "run.json").read_text()
        code, said = campaign.run("ppo_full", tmp_path)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2
        assert len(errors) == 1
        assert f"{stage / '.lock'}: expected no other run that writes there, found process {first} on host" in errors[0]
        assert (stage / "run.json").read_text() == before
        os.kill(first, signal.SIGCONT)
        assert campaign.forge.wait(first) == 0
        assert campaign.finish("ppo_full", tmp_path, expected).count("done already") == 1


@pytest.mark.parametrize("recipe", ["ppo_full", "reward_stage"])
def test_a_second_run_that_got_ready_while_the_first_ended_leaves(campaign, tmp_path, recipe):
    stage = campaign.stage(recipe, tmp_path)
    with trial("second run of a stage, late"):
        late = campaign.begin(recipe, tmp_path, {"phase": "begin", "call": 1, "signal": signal.SIGSTOP})
        log, end = campaign.folder / f"log_{campaign.logs}", time.monotonic() + 30
        while psutil.Process(late).status() != psutil.STATUS_STOPPED and time.monotonic() < end:
            time.sleep(0.05)
        assert campaign.run(recipe, tmp_path)[0] == 0
        before = {path: path.stat().st_mtime_ns for path in stage.rglob("*") if path.is_file()}
        os.kill(late, signal.SIGCONT)
        assert campaign.forge.wait(late) == 0
        assert f"{stage.name}: done already in {stage}\n" in forge.said(log)
        assert {path: path.stat().st_mtime_ns for path in stage.rglob("*") if path.is_file()} == before
