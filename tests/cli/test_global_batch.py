"""One recipe file, started on one, two and four processes: the same experiment."""

import json
from pathlib import Path

import pytest
from forge import ranks, said
from tiny_ppo import timeless
from tiny_recipe import recipe
from workers import forge, rows

# 13 pairs in batches of 4: the last one is filled up. 7 pairs to validate, 2 at a time and process.
# 10 prompts in batches of 4: the last one leaves ranks without.
CHANGES = {
    "reward": {
        "global_batch_size": 4,
        "per_device_train_batch_size": 4,
        "max_examples": 13,
        "validation_examples": 7,
        "per_device_eval_batch_size": 2,
        "num_train_epochs": 2,
        "train_sampling_strategy": "group_by_length",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
    },
    "ppo_full": {
        "global_batch_size": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "num_ppo_epochs": 2,
    },
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The recipe, and its run on one process."""
    folder = recipe(tmp_path_factory.mktemp("processes") / "recipe", **CHANGES)
    start(folder, "reward", "train_reward", 1)
    start(folder, "ppo_full", "train_ppo", 1)
    return folder


def start(folder: Path, stage: str, script: str, processes: int, reward_of: int | None = None) -> str:
    """Run a stage on this many processes, in a run named after their number; returns the output of rank 0's log."""
    run = f"on-{processes}"
    argv = ["--config", folder / f"{stage}.yaml", "--run", run, "--runs_dir", folder.parent / "runs"]
    if reward_of is not None:
        argv += ["--reward_model_path", folder.parent / "runs" / f"on-{reward_of}" / "reward"]
    logs = [folder.parent / f"{stage}-{processes}-{rank}" for rank in range(processes)]
    environments = ranks(processes) if processes > 1 else [{}]
    pids = [
        forge().start(script, argv, log, ACCELERATE_USE_CPU="true", **given)
        for log, given in zip(logs, environments, strict=True)
    ]
    codes = [forge().wait(pid, 200) for pid in pids]
    assert codes == [0] * processes, "\n".join(said(log)[-2000:] for log in logs)
    return (folder.parent / "runs" / run / "logs" / f"{stage}.log").read_text()


def metrics(folder, processes, stage):
    return rows(folder.parent / "runs" / f"on-{processes}" / stage / "metrics.jsonl")


def facts(folder, processes, stage):
    return json.loads((folder.parent / "runs" / f"on-{processes}" / stage / "run.json").read_text())


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ppo_is_the_same_experiment(files, processes):
    told = start(files, "ppo_full", "train_ppo", processes, reward_of=1)
    at_a_time, parts = {2: (2, 1), 4: (1, 1)}[processes]
    assert (
        told.count(f"batch: 4 prompts per step = {processes} processes x {at_a_time} prompts at a time x {parts} ") == 1
    )
    assert facts(files, processes, "ppo_full")["batch"] == {
        "global_batch_size": 4,
        "processes": processes,
        "per_device_train_batch_size": at_a_time,
        "gradient_accumulation_steps": parts,
    }
    one, several = metrics(files, 1, "ppo_full"), metrics(files, processes, "ppo_full")
    assert [row["step"] for row in several] == [row["step"] for row in one] == [1, 2, 3]
    for first, second in zip(one, several, strict=True):
        for name, value in timeless(first).items():
            assert second[name] == pytest.approx(value, abs=1e-4), (first["step"], name)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_reward_training_is_the_same_experiment(files, processes):
    told = start(files, "reward", "train_reward", processes)
    at_a_time = 4 // processes
    assert told.count(f"batch: 4 pairs per step = {processes} processes x {at_a_time} pairs at a time x 1 ") == 1
    assert facts(files, processes, "reward")["batch"]["global_batch_size"] == 4
    one, several = metrics(files, 1, "reward"), metrics(files, processes, "reward")
    losses = [[(row["step"], row["loss"]) for row in found if "loss" in row] for found in (one, several)]
    assert len(losses[0]) == 8  # 4 updates a pass
    assert len({loss for _, loss in losses[0]}) == 8
    for (step, loss), (again, same) in zip(*losses, strict=True):
        assert again == step
        assert same == pytest.approx(loss, abs=1e-4)
    validation = [[row["eval_loss"] for row in found if "eval_loss" in row] for found in (one, several)]
    assert validation[1] == pytest.approx(validation[0], abs=1e-4)
