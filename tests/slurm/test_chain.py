"""The real .sbatch files on a real Slurm of two nodes, with tiny models on the CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import HANG
from safetensors.torch import load_file
from tiny_recipe import recipe
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, missing

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(missing() is not None, reason=f"no Slurm here: {missing()}"),
]
STEPS = 40
LONG = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 2}
LONG |= {"num_sample_generations": 0}
# A reward that adds nothing, but time to each step while the file beside it says so: what comes from outside then finds
# the training at it, and no core is taken from other tests.
PACE = """
import time
from pathlib import Path

def wait(completions, **_):
    slow = Path(__file__).with_name("seconds-a-step")
    time.sleep(float(slow.read_text()) if slow.exists() else 0.0)
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    recipe(folder / "recipe", ppo_full=LONG)
    return folder


def settings(top):
    return {
        "RLHF_HOME": str(ROOT),
        "RLHF_VENV": sys.prefix,
        "RUNS_DIR": str(top / "runs"),
        "RLHF_PROCESSES": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }


def asked(cluster, top, run, *options, recipe="recipe"):
    """What submitting the chain prints."""
    command = ["bash", "slurm/pipeline.sh", "--recipe", str(top / recipe), "--run", run, *options]
    return cluster.run(*command, cwd=ROOT, env=settings(top))


def submit(*args, **options):
    """The chain; returns stage -> job id."""
    said = asked(*args, **options)
    jobs = dict(line.split(": job ") for line in said.splitlines() if ": job " in line)
    assert jobs, said
    return jobs


def logs(top, run):
    files = sorted((top / "runs" / run / "logs").glob("*.log"))
    return "\n".join(f"== {p.name}\n{errors(p)}{p.read_text()[-1500:]}" for p in files)


def errors(path):
    """The lines for the user. The launcher's own follow, and would push them out of the part that is shown."""
    return "".join(line for line in path.open() if "error:" in line)


def rank_logs(top, run, stage):
    """Each rank's output, by rank; there is one process per node."""
    folders = sorted((top / "runs" / run / "logs").glob(f"{stage}-[0-9]*-node*/*/attempt_0/*"))
    assert all((folder / "stderr.log").exists() for folder in folders)
    return [(folder / "stdout.log").read_text() for folder in folders]


def facts(top, run, stage):
    return json.loads((top / "runs" / run / stage / "run.json").read_text())


def steps(top, run):
    path = top / "runs" / run / "ppo_full" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def chain(cluster, top):
    """The whole chain over two nodes, run once."""
    jobs = submit(cluster, top, "whole", "--nodes=2", "--time=10")
    # A stage that was requeued after its end, and run again, ends in the same state.
    return {stage: (cluster.finish(job), cluster.state(job).get("Restarts")) for stage, job in jobs.items()}


def test_the_whole_chain_over_two_nodes(top, chain):
    assert chain == dict.fromkeys(
        ["reward", "reward_gold", "ppo_full", "ppo_lora", "evaluation", "report"], ("COMPLETED", "0")
    ), logs(top, "whole")
    for stage in ("reward", "reward_gold", "ppo_full", "ppo_lora", "evaluation"):
        assert facts(top, "whole", stage)["status"] == "done"
        assert facts(top, "whole", stage)["world_size"] == 2
    for stage in ("ppo_full", "ppo_lora"):
        first, second = rank_logs(top, "whole", stage)
        assert "      peak " in first
        assert second == ""
        log = (top / "runs" / "whole" / "logs" / f"{stage}-rank1.log").read_text()
        assert "\nprompts: " in log  # the other rank has read them, too
    for stage in ("reward", "reward_gold", "evaluation"):
        assert len(rank_logs(top, "whole", stage)) == 2
    assert (top / "runs" / "whole" / "report" / "report.html").exists()
    assert steps(top, "whole") == list(range(1, STEPS + 1))


def test_submitting_again_leaves_out_what_is_done(cluster, top, chain):
    said = asked(cluster, top, "whole", "--time=10").splitlines()
    assert said.count("report: already done") == 1
    assert not [line for line in said if ": job " in line]
    shutil.rmtree(top / "runs" / "whole" / "report")
    jobs = submit(cluster, top, "whole", "--time=10")
    assert set(jobs) == {"report"}
    assert cluster.finish(jobs["report"]) == "COMPLETED", logs(top, "whole")


def branch(top, run):
    """A new run with the reward model of the whole chain."""
    (top / "runs" / run).mkdir(parents=True)
    shutil.copytree(top / "runs" / "whole" / "reward", top / "runs" / run / "reward")


def paced(top, run, seconds):
    """A new run whose steps wait so long; returns its recipe, and the file that says so until it is removed."""
    branch(top, run)
    folder = top / "runs" / run
    (folder / "pace.py").write_text(PACE)
    (folder / "seconds-a-step").write_text(str(seconds))
    rewards = {"reward_model_path": f"{folder}/reward", "rewards": [f"{folder}/pace.py:wait"]}
    return recipe(top / f"recipe-of-{run}", ppo_full=LONG | rewards), folder / "seconds-a-step"


def only_ppo(cluster, top, run, *options, **changes):
    environment = settings(top) | {"RECIPE": str(top / "recipe"), "RUN": run} | changes
    (top / "runs" / run / "logs").mkdir()
    output = f"--output={top}/runs/{run}/logs/ppo_full-%j.log"
    return cluster.run(
        "sbatch", "--parsable", output, *options, "slurm/ppo_full.sbatch", cwd=ROOT, env=environment
    ).split()[-1]


def same_policy(top, run):
    one, other = (load_file(top / "runs" / r / "ppo_full" / "model.safetensors") for r in ("whole", run))
    for name, tensor in one.items():
        assert_close(other[name], tensor, atol=1e-4, rtol=0, msg=name)


def test_a_time_limit_costs_nothing(cluster, top, chain):
    """Slurm warns when it first checks the limit of 10 minutes; the job saves, requeues itself and resumes."""
    slowed, slow = paced(top, "limited", 2)  # Slurm looks every 30 s, and all steps take longer
    options = ["--nodes=2", "--time=10", "--signal=B:USR1@595"]
    job = only_ppo(cluster, top, "limited", *options, RECIPE=str(slowed))
    cluster.wait_for(lambda: int(cluster.state(job).get("Restarts", 0)) >= 1)
    slow.unlink()
    cluster.run("scontrol", "update", f"job={job}", "timelimit=60")
    assert cluster.finish(job) == "COMPLETED", logs(top, "limited")
    assert steps(top, "limited") == list(range(1, STEPS + 1))
    same_policy(top, "limited")
    assert "told to stop" in logs(top, "limited")


def test_a_node_that_goes_down_costs_the_steps_since_the_last_checkpoint(cluster, top, chain):
    slowed, slow = paced(top, "broken", 0.5)
    # One process in place of two: the batch is that of the whole chain again.
    options = ["--nodes=1", "--time=10"]
    flags = "--gradient_accumulation_steps 4"
    job = only_ppo(cluster, top, "broken", *options, RECIPE=str(slowed), RLHF_FLAGS=flags)
    cluster.wait_for(lambda: len(steps(top, "broken")) > 10)
    node = cluster.state(job)["NodeList"]
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    slow.unlink()
    assert cluster.finish(job) == "COMPLETED", logs(top, "broken")
    cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
    assert int(cluster.state(job)["Restarts"]) == 1
    assert cluster.state(job)["NodeList"] != node
    assert steps(top, "broken") == list(range(1, STEPS + 1))
    same_policy(top, "broken")


def test_a_failing_stage_cancels_what_waits_for_it(cluster, top):
    recipe(top / "wrong", reward={"learning_rat": 1.0})
    (top / "wrong" / "reward_gold.yaml").unlink()  # test_commands.py has that it waits for nothing
    jobs = submit(cluster, top, "failed", "--time=10", recipe="wrong")
    states = {stage: cluster.finish(job) for stage, job in jobs.items()}
    cancelled = dict.fromkeys(["ppo_full", "ppo_lora", "evaluation", "report"], "CANCELLED")
    assert states == {"reward": "FAILED"} | cancelled
    assert "learning_rat" in logs(top, "failed")


def test_deepspeed_over_two_nodes(cluster, top, chain):
    recipe(top / "sharded")
    branch(top, "sharded")
    changes = {
        "RECIPE": str(top / "sharded"),
        "RLHF_ENGINE": "zero3",
        "ACCELERATE_USE_CPU": "false",
        "DS_ACCELERATOR": "cpu",
    }
    job = only_ppo(cluster, top, "sharded", "--nodes=2", "--time=10", **changes)
    assert cluster.finish(job) == "COMPLETED", logs(top, "sharded")
    assert facts(top, "sharded", "ppo_full")["engine"] == "DEEPSPEED ZeRO-3"
    assert facts(top, "sharded", "ppo_full")["world_size"] == 2
    assert (top / "runs" / "sharded" / "ppo_full" / "model.safetensors").exists()
    assert len(rank_logs(top, "sharded", "ppo_full")) == 2


def test_an_engine_stays_on_one_process(cluster, top):
    recipe(top / "single")
    changes = {"RLHF_ENGINE": "zero2", "ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu", "RUN": "single"}
    (top / "runs" / "single" / "logs").mkdir(parents=True)
    environment = settings(top) | changes | {"RECIPE": str(top / "single")}
    output = f"--output={top}/runs/single/logs/reward-%j.log"
    command = ["sbatch", "--parsable", output, "--nodes=1", "--time=10", "slurm/reward.sbatch"]
    job = cluster.run(*command, cwd=ROOT, env=environment).split()[-1]
    assert cluster.finish(job) == "COMPLETED", logs(top, "single")
    assert facts(top, "single", "reward")["engine"] == "DEEPSPEED ZeRO-2"
    assert facts(top, "single", "reward")["world_size"] == 1


TELL = """#!/bin/bash
#SBATCH --ntasks-per-node=1
source "$RLHF_HOME/slurm/stage.sh"
run_stage reward "$TELLER"
"""


def test_every_node_gets_the_cpus_and_the_variables_of_the_job(cluster, top):
    """Even if the job exports few variables; and srun ignores sbatch's CPUs by itself."""
    (top / "runs" / "told" / "logs").mkdir(parents=True)
    (top / "tell.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    (top / "tell.sbatch").write_text(TELL)
    own = {"RECIPE": "demo", "RUN": "told", "TELLER": str(top / "tell.py"), "NCCL_SOCKET_IFNAME": "eth0"}
    environment = settings(top) | own
    names = [*own, "RLHF_HOME", "RLHF_VENV", "RUNS_DIR", "RLHF_PROCESSES", "PATH"]
    options = ["--nodes=1", "--time=5", "--cpus-per-task=4", f"--export={','.join(names)}"]
    command = ["sbatch", "--parsable", f"--output={top}/runs/told/logs/job-%j.log", *options, str(top / "tell.sbatch")]
    job = cluster.run(*command, cwd=ROOT, env=environment).split()[-1]
    assert cluster.finish(job) == "COMPLETED", logs(top, "told")
    (log,) = (top / "runs" / "told" / "logs").glob("reward-*-node0.log")
    said = json.loads(next(line for line in log.read_text().splitlines() if line.startswith("{")))
    assert said["SLURM_CPUS_PER_TASK"] == "4"
    assert said["NCCL_SOCKET_IFNAME"] == "eth0"


def test_each_seed_is_a_run_of_its_own(cluster, top):
    """By `pipeline.py --executor slurm`, as job arrays."""
    recipe(top / "short")
    # It is about seeds, and jobs cost a minute each. test_commands.py has the seeds of the other stages.
    for stage in ("reward_gold", "ppo_lora", "evaluation"):
        (top / "short" / f"{stage}.yaml").unlink()
    command = [sys.executable, "scripts/pipeline.py", "--executor", "slurm", "--recipe", str(top / "short")]
    command += ["--run", "many", "--seeds", "1,2", "--sbatch=--time=10", "--runs_dir", str(top / "runs")]
    said = cluster.run(*command, cwd=ROOT, env=settings(top))
    jobs = dict(line.split(": job ") for line in said.splitlines() if ": job " in line)
    assert set(jobs) == {"reward", "ppo_full", "report"}, said

    def states():
        return re.findall(r"JobState=(\w+)", cluster.run("scontrol", "show", "job", jobs["report"]))

    cluster.wait_for(lambda: states() and not {"PENDING", "RUNNING", "COMPLETING"} & set(states()))
    assert states() == ["COMPLETED"] * 2, logs(top, "many")
    for seed in (1, 2):
        run = f"many-seed{seed}"
        assert (top / "runs" / run / "report" / "report.html").exists()
        assert {facts(top, run, stage)["seed"] for stage in ("reward", "ppo_full")} == {seed}
    weights = [load_file(top / "runs" / f"many-seed{seed}" / "ppo_full" / "model.safetensors") for seed in (1, 2)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    files = [str(path) for pattern in ("*.sbatch", "*.sh") for path in sorted((ROOT / "slurm").glob(pattern))]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True, timeout=HANG, env=os.environ)
    assert done.returncode == 0, done.stdout
