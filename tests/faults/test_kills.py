"""SIGKILL at any moment, also between any two changes of a file: run again, it ends as if nothing had been."""

import os
import random
import signal
import time
from contextlib import ExitStack

import forge
import psutil
import pytest
from limits import HANG
from trials import TALLY, trial

IN_A_ROW = 3  # kills of one run, each as it goes on from the one before
RUNS = 25  # over 50 kills of PPO, also where some come too late
IN_SAVE = " in a save"
RAN = []  # recipes of the runs that were killed
first_quick = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, RUNS))]


# All return the exit code and, where it is known, the path at which the run was killed. part: who goes on from a kill
# has less to do, and is killed earlier.


def killed_at_a_time(campaign, recipe, where, dice, part):
    pid = campaign.begin(recipe, where)
    time.sleep(dice.uniform(0, 0.9 * campaign.reference(recipe)["seconds"] / part))
    os.kill(pid, signal.SIGKILL)
    return campaign.forge.wait(pid), ""


def killed_at_a_change(campaign, recipe, where, dice, part, of=""):
    changes = sum(of in path for path in campaign.reference(recipe)["changes"])
    tell, folder = campaign.new_log(), f"{campaign.stage(recipe, where)}/{of}" if of else where
    fault = {"changes_of": str(folder), "at": dice.randint(1, changes // part), "tell": str(tell)}
    code, _ = campaign.run(recipe, where, fault)
    return code, tell.read_text().split("\n")[-1]


def killed_in_a_save(*given):
    return killed_at_a_change(*given, of="checkpoint")


def killed_and_finished(campaign, recipe, where, dice):
    """A time may be after the end of a run that had little left to do."""
    campaign.reference(recipe)
    RAN.append(recipe)
    kills = dice.sample((killed_at_a_time, killed_at_a_change, killed_in_a_save), IN_A_ROW)
    with ExitStack() as trials:
        for part, kill in enumerate(kills, start=1):
            code, path = kill(campaign, recipe, where, dice, part)
            assert code in (-signal.SIGKILL, 0)
            if code == 0:
                break
            trials.enter_context(trial(f"SIGKILL{IN_SAVE if 'checkpoint' in path else ''}, {recipe}"))
        campaign.finish(recipe, where)


@pytest.mark.parametrize("seed", first_quick)
def test_ppo_survives_kills(campaign, tmp_path, seed):
    recipe = ("ppo_full", "ppo_lora")[seed % 2]
    killed_and_finished(campaign, recipe, tmp_path, random.Random(f"{recipe} {seed}"))


@pytest.mark.slow
def test_there_were_fifty_kills_of_ppo_and_some_hit_a_save():
    if sum(recipe.startswith("ppo") for recipe in RAN) < RUNS - 1:  # the first is no slow one
        pytest.skip("counts the kills of the whole campaign")
    kills = {kind: tried for kind, (tried, _) in TALLY.items() if kind.startswith("SIGKILL") and "ppo" in kind}
    assert sum(kills.values()) >= 50
    for recipe in ("ppo_full", "ppo_lora"):
        assert kills[f"SIGKILL{IN_SAVE}, {recipe}"] >= 5


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
        end = time.monotonic() + HANG
        while psutil.Process(first).status() != psutil.STATUS_STOPPED and time.monotonic() < end:
            time.sleep(0.05)
        before = (stage / "run.json").read_text()
        code, said = campaign.run("ppo_full", tmp_path)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2
        assert len(errors) == 1
        assert f"{stage / '.lock'}: in use by process {first} on host" in errors[0]
        assert (stage / "run.json").read_text() == before
        os.kill(first, signal.SIGCONT)
        assert campaign.forge.wait(first) == 0
        assert campaign.finish("ppo_full", tmp_path, expected).count("already done") == 1


@pytest.mark.parametrize("recipe", ["ppo_full", "reward_stage"])
def test_a_second_run_that_got_ready_while_the_first_ended_leaves(campaign, tmp_path, recipe):
    stage = campaign.stage(recipe, tmp_path)
    with trial("second run of a stage, late"):
        late = campaign.begin(recipe, tmp_path, {"phase": "begin", "call": 1, "signal": signal.SIGSTOP})
        log, end = campaign.folder / f"log_{campaign.logs}", time.monotonic() + HANG
        while psutil.Process(late).status() != psutil.STATUS_STOPPED and time.monotonic() < end:
            time.sleep(0.05)
        assert campaign.run(recipe, tmp_path)[0] == 0
        before = {path: path.stat().st_mtime_ns for path in stage.rglob("*") if path.is_file()}
        os.kill(late, signal.SIGCONT)
        assert campaign.forge.wait(late) == 0
        assert f"{stage.name}: already done in {stage}\n" in forge.said(log)
        assert {path: path.stat().st_mtime_ns for path in stage.rglob("*") if path.is_file()} == before
