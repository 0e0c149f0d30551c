"""Two processes: one is killed and the other ends; both go on later, to the bit; another number of them is answered."""

import json
import os
import signal
import time

import pytest
import short_runs
from bombs import torch_bomb
from forge import ranks
from limits import HANG
from trials import trial

from rlhf.storage.disk import write_manifest

HALF = ["--per_device_train_batch_size", "1"]  # on each of two processes: the batch of one process
REWARD_HALF = ["--per_device_train_batch_size", "4"]


class Pair:
    """Both ranks of one run, started and waited for as a launcher does."""

    def __init__(self, campaign, recipe, where, more=(), faults=(None, None)):
        self.campaign = campaign
        where.mkdir(parents=True, exist_ok=True)
        script, argv = campaign.script(recipe), [*short_runs.argv(campaign.start, recipe, where), *more]
        self.logs = [campaign.new_log() for _ in range(2)]
        self.pids = [
            campaign.forge.start(script, argv, log, fault, ACCELERATE_USE_CPU="true", **rank)
            for log, fault, rank in zip(self.logs, faults, ranks(2), strict=True)
        ]

    def end(self, limit=HANG):
        """Exit codes; None where a rank was still there at the limit."""
        return [self.campaign.forge.wait(pid, limit) for pid in self.pids]

    def said(self):
        return "".join((log.parent / f"{log.name}.{end}").read_text() for log in self.logs for end in ("out", "err"))


def whole(campaign, recipe, where, more):
    """Results of both ranks when nothing happens to them."""
    pair = Pair(campaign, recipe, where, more)
    assert pair.end() == [0, 0], pair.said()[-3000:]
    return short_runs.results(campaign.stage(recipe, where))


@pytest.fixture(scope="session")
def pairs(campaign):
    """recipe -> what two processes end in."""
    known = {}

    def ask(recipe, more):
        if recipe not in known:
            known[recipe] = whole(campaign, recipe, campaign.folder / f"pair_{recipe}", more)
        return known[recipe]

    return ask


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "phase", "rank"),
    [("ppo_lora", "save", 0), ("ppo_lora", "learn", 1), ("reward_stage", "seal", 1)],
)
def test_one_rank_is_killed(campaign, pairs, tmp_path, recipe, phase, rank):
    more = REWARD_HALF if recipe == "reward_stage" else HALF
    expected = pairs(recipe, more)
    faults = [None, None]
    faults[rank] = {"phase": phase, "call": 3, "signal": signal.SIGKILL}
    with trial(f"one of two ranks killed, {recipe}"):
        begun = time.monotonic()
        pair = Pair(campaign, recipe, tmp_path, more, faults)
        codes = pair.end()
        assert codes[rank] == -signal.SIGKILL
        assert codes[1 - rank] not in (None, 0), pair.said()[-3000:]
        assert time.monotonic() - begun < HANG
        assert whole(campaign, recipe, tmp_path, more) == expected


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ppo_lora", "reward_stage"])
def test_one_rank_is_told_to_stop(campaign, pairs, tmp_path, recipe):
    """Dropout draws from each rank's own stream, which the checkpoint has, too."""
    more = REWARD_HALF if recipe == "reward_stage" else HALF
    expected = pairs(recipe, more)
    phase, call = ("seal", 2) if recipe == "reward_stage" else ("learn", 2)
    with trial(f"SIGTERM to one of two ranks, {recipe}"):
        pair = Pair(campaign, recipe, tmp_path, more, [None, {"phase": phase, "call": call, "signal": signal.SIGTERM}])
        assert pair.end() == [0, 0], pair.said()[-3000:]
        assert json.loads((campaign.stage(recipe, tmp_path) / "run.json").read_text())["status"] == "stopped"
        assert whole(campaign, recipe, tmp_path, more) == expected


@pytest.mark.slow
def test_both_ranks_are_refused_by_one_line_while_another_run_is_there(campaign, tmp_path):
    with trial("second run of a stage, two ranks"):
        stage = campaign.stage("ppo_full", tmp_path)
        first = campaign.begin("ppo_full", tmp_path, {"phase": "learn", "call": 1, "signal": signal.SIGSTOP})
        how = signal.SIGKILL  # a stopped process would stay for ever
        try:
            end = time.monotonic() + HANG
            while not (stage / ".lock").exists() and time.monotonic() < end:
                time.sleep(0.05)
            pair = Pair(campaign, "ppo_full", tmp_path, HALF)
            assert pair.end() == [2, 2], pair.said()[-3000:]
            assert pair.said().count("error: ") == 1
            how = signal.SIGCONT
        finally:
            os.kill(first, how)
            code = campaign.forge.wait(first)
        assert code == 0


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_began_and_back(campaign, tmp_path):
    """The same responses a step: the same run up to floating point. LoRA's dropout is off, as it is a rank's own."""
    off = ["--lora_dropout", "0.0"]
    expected = whole(campaign, "ppo_lora", tmp_path / "whole", [*HALF, *off])["metrics.jsonl"]
    where = tmp_path / "cut"
    with trial("another number of processes"):
        stop = {"phase": "learn", "call": 1, "signal": signal.SIGTERM}
        pair = Pair(campaign, "ppo_lora", where, [*HALF, *off], [stop, None])
        assert pair.end() == [0, 0], pair.said()[-3000:]
        code, said = campaign.run("ppo_lora", where, {"phase": "learn", "call": 2, "signal": signal.SIGTERM}, off)
        assert code == 0, said[-3000:]
        assert "stopped at step 3" in said
        found = whole(campaign, "ppo_lora", where, [*HALF, *off])["metrics.jsonl"]
        assert [row["step"] for row in found] == [1, 2, 3, 4]
        for one, other in zip(expected, found, strict=True):
            assert other == pytest.approx(one, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ppo_lora", "reward_stage"])
def test_another_batch_is_refused(campaign, tmp_path, recipe):
    phase, call = ("seal", 1) if recipe == "reward_stage" else ("learn", 1)
    with trial("other number of processes, other batch"):
        campaign.run(recipe, tmp_path, {"phase": phase, "call": call, "signal": signal.SIGTERM})
        pair = Pair(campaign, recipe, tmp_path)
        assert pair.end() == [2, 2], pair.said()[-3000:]
        (line,) = [line for line in pair.said().splitlines() if line.startswith("error: ")]
        size, doubled = (8, 16) if recipe == "reward_stage" else (4, 8)
        assert f"written with batch_size {size}, but this run has {doubled}" in line
        campaign.finish(recipe, tmp_path)


@pytest.mark.parametrize("fault", ["a bomb", "another adapter"])
def test_what_no_rank_can_go_on_from_is_one_line_of_one_rank(campaign, tmp_path, fault):
    with trial(f"two ranks, {fault}"):
        stop = {"phase": "learn", "call": 1, "signal": signal.SIGTERM}
        assert campaign.run("ppo_lora", tmp_path, stop)[0] == 0
        checkpoint = campaign.stage("ppo_lora", tmp_path) / "checkpoints" / "step-1"
        if fault == "a bomb":
            torch_bomb(checkpoint / "custom_checkpoint_0.pkl", tmp_path / "marker")
            write_manifest(checkpoint)
        pair = Pair(campaign, "ppo_lora", tmp_path, [*HALF, "--lora_r", "2" if fault == "a bomb" else "4"])
        assert pair.end() == [2, 2], pair.said()[-3000:]
        (line,) = [line for line in pair.said().splitlines() if line.startswith("error: ")]
        if fault == "another adapter":
            assert line == "error: ppo_lora: settings differ (lora_r 2 → 4): --redo, or another --run"
        else:
            assert line.startswith(f"error: {checkpoint}")
        assert ("found a pickle that calls" in line) == (fault == "a bomb")
        assert "Traceback" not in pair.said()
        assert not (tmp_path / "marker").exists()


def test_a_rank_that_sees_files_late_goes_where_the_first_goes(campaign, tmp_path):
    """Whether there is a checkpoint, or a stage is done, is for rank 0 to say: each would wait for the other."""
    stage, late = campaign.stage("ppo_full", tmp_path), {"blind": str(tmp_path)}
    with trial("two ranks, one sees files late"):
        stop = {"phase": "learn", "call": 2, "signal": signal.SIGTERM}
        pair = Pair(campaign, "ppo_full", tmp_path, HALF, (stop, late))
        assert pair.end() == [0, 0], pair.said()[-3000:]
        assert sorted(path.name for path in (stage / "checkpoints").iterdir()) == ["step-1", "step-2"]
        pair = Pair(campaign, "ppo_full", tmp_path, HALF, (None, late))
        assert pair.end() == [0, 0], pair.said()[-3000:]
        rows = short_runs.results(stage)["metrics.jsonl"]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        pair = Pair(campaign, "ppo_full", tmp_path, HALF, (None, late))
        assert pair.end() == [0, 0], pair.said()[-3000:]
        assert pair.said().count("ppo_full: already done") == 1
