"""Told to stop in any phase, a run ends its step, saves and says so; run again, it goes on as if nothing had been."""

import json
import signal

import pytest
from trials import trial

from rlhf.storage.checkpoint import PPO, REWARD, numbered

# The evaluation before the first step generates and scores, too: the first calls are its.
MOST = [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGUSR1, signal.SIGINT))]
PHASES = [("generate", 1), ("score", 1), ("generate", 3), ("score", 3), ("learn", 2), ("save", 2), ("log", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=["TERM", "USR1", "INT"])
@pytest.mark.parametrize(("phase", "call"), PHASES)
@pytest.mark.parametrize("recipe", ["ppo_full", "ppo_lora"])
def test_ppo_stops_and_goes_on(campaign, tmp_path, recipe, phase, call, number):
    stage = campaign.stage(recipe, tmp_path)
    with trial(f"{signal.Signals(number).name} in {phase}"):
        code, said = campaign.run(recipe, tmp_path, {"phase": phase, "call": call, "signal": number})
        assert code == 0, said[-3000:]
        assert json.loads((stage / "run.json").read_text())["status"] == "stopped"
        last = numbered(stage / "checkpoints", PPO)[-1]
        assert last.name in (("step-1",) if call == 1 else ("step-1", "step-2"))
        assert f"stopped at step {last.name[-1]}; run the same command again to resume" in said
        assert not (stage / ".lock").exists()
        campaign.finish(recipe, tmp_path)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGUSR1, signal.SIGINT))]
)
@pytest.mark.parametrize("phase", ["end", "model"])
def test_a_model_that_is_trained_is_saved(campaign, tmp_path, phase, number):
    with trial(f"{signal.Signals(number).name} in the last save"):
        assert campaign.run("ppo_full", tmp_path, {"phase": phase, "call": 1, "signal": number})[0] == 0
        assert "already done" in campaign.finish("ppo_full", tmp_path)


# In phase and call, and the checkpoint that it stops with. The evaluation before the first step is the first call.
REWARD_PHASES = [("train", 2, 2), ("evaluate", 1, 1), ("evaluate", 3, 3), ("metrics", 4, 3), ("seal", 2, 3)]


@pytest.mark.parametrize(
    ("phase", "call", "step"),
    [REWARD_PHASES[0], *(pytest.param(*p, marks=pytest.mark.slow) for p in REWARD_PHASES[1:])],
)
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGUSR1, signal.SIGINT))]
)
def test_the_reward_stage_stops_and_goes_on(campaign, tmp_path, phase, call, step, number):
    with trial(f"{signal.Signals(number).name}, reward, in {phase}"):
        code, said = campaign.run("reward_stage", tmp_path, {"phase": phase, "call": call, "signal": number})
        assert code == 0, said[-3000:]
        stage = campaign.stage("reward_stage", tmp_path)
        assert json.loads((stage / "run.json").read_text())["status"] == "stopped"
        assert f"stopped at step {step}; run the same command again to resume" in said
        assert numbered(stage, REWARD)[-1].name == f"checkpoint-{step}"
        campaign.finish("reward_stage", tmp_path)
