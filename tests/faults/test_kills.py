"""SIGKILL at any moment, also between any two changes of a file: run again, it ends as if nothing had been."""

import os
import random
import signal
import time

import pytest
from conftest import trial

MOMENTS = 50
quick_then_slow = [
    0,
    *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, MOMENTS // 2)),
]


def killed_at_a_time(campaign, recipe, where, dice):
    pid = campaign.begin(recipe, where)
    time.sleep(dice.uniform(0, campaign.reference(recipe)["seconds"]))
    os.kill(pid, signal.SIGKILL)
    return campaign.forge.wait(pid)


def killed_at_a_change(campaign, recipe, where, dice):
    at = dice.randint(1, campaign.reference(recipe)["changes"])
    return campaign.run(recipe, where, {"changes_of": str(where), "at": at})[0]


@pytest.mark.parametrize("recipe", ["ppo_full", "ppo_lora"])
@pytest.mark.parametrize("seed", quick_then_slow)
def test_ppo_survives_a_kill(campaign, tmp_path, recipe, seed):
    """Half at times, half at changes of files; every tenth run is killed a second time as it goes on."""
    dice = random.Random(f"{recipe} {seed}")
    first, second = (killed_at_a_time, killed_at_a_change)[:: 1 if seed % 2 else -1]
    campaign.reference(recipe)
    with trial(f"SIGKILL, {recipe}"):
        assert first(campaign, recipe, tmp_path, dice) in (-signal.SIGKILL, 0)  # 0: it was quicker
        if seed % 10 == 0:
            second(campaign, recipe, tmp_path, dice)
        campaign.finish(recipe, tmp_path)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))])
def test_the_reward_stage_survives_a_kill(campaign, tmp_path, seed):
    dice = random.Random(f"reward {seed}")
    campaign.reference("reward_stage")
    with trial("SIGKILL, reward"):
        kill = killed_at_a_time if seed % 2 else killed_at_a_change
        assert kill(campaign, "reward_stage", tmp_path, dice) in (-signal.SIGKILL, 0)
        campaign.finish("reward_stage", tmp_path)


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
