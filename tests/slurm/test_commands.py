"""What the job files ask Slurm for: its commands are replaced by scripts that print their arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG

from rlhf.storage.stages import RECIPES, STAGES, stages_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def commands(tmp_path):
    """Run a job file with replaced commands first in PATH. activate: what the environment's own script does."""
    there = tmp_path / "bin"
    there.mkdir()
    says = '#!/bin/bash\necho "NAME $*" >&2\nenv | grep -E "^(OMP|ACCELERATE)_" >&2\necho 7\n'
    for name in ("srun", "sbatch", "python"):
        (there / name).write_text(says.replace("NAME", name))
    # The plan of the stages is the real one.
    real = f'[ "$2" != rlhf.cli.plan ] || exec {sys.executable} "$@"\n'
    (there / "python").write_text(says.replace("NAME", "python").replace("\n", "\n" + real, 1))
    (there / "scontrol").write_text("#!/bin/bash\necho n1\n")
    for path in there.iterdir():
        path.chmod(0o755)

    def run(script, *argv, activate="", **settings):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "RLHF_", "OMP_", "ACC"))}
        job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "RLHF_HOME": str(ROOT)}
        names = {"RECIPE": "demo", "RUN": "x", "RUNS_DIR": str(tmp_path / "runs"), "RLHF_VENV": str(tmp_path / "venv")}
        (tmp_path / "venv" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "venv" / "bin" / "activate").write_text(activate)
        done = subprocess.run(
            ["bash", str(ROOT / "slurm" / script), *argv],
            env=clean | job | names | {"PATH": f"{there}:{os.environ['PATH']}"} | settings,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=HANG,
        )
        return done.stdout + done.stderr

    return run


def test_a_step_gets_the_cpus_of_its_job_and_every_variable(commands):
    said = commands("reward.sbatch", SLURM_CPUS_PER_TASK="32", SLURM_GPUS_ON_NODE="4", SLURM_CPUS_ON_NODE="32")
    step = next(line for line in said.splitlines() if line.startswith("srun "))
    for option in ("--cpus-per-task=32", "--cpu-bind=none", "--export=ALL"):
        assert f" {option} " in step
    assert "slow" not in said


def test_a_warning_before_the_training_starts_is_passed_on(commands, tmp_path):
    """A job of a busy cluster may be told to stop in its first second."""
    told = tmp_path / "told"
    for name, does in (
        ("scancel", f"echo scancel $* >&2; touch {told}"),
        ("srun", f"for i in $(seq 600); do [ ! -e {told} ] || exit 0; /bin/sleep 0.1; done"),
        ("sleep", "exec /bin/sleep 0.1"),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    said = commands("reward.sbatch", activate="kill -USR1 $$\n")
    assert "told to stop" in said
    assert "scancel --signal=USR1 5.0" in said
    assert "reward: not_run, code 0" in said


def test_when_all_is_done_nothing_is_submitted(commands, tmp_path, monkeypatch):
    (tmp_path / "bin" / "python").write_text(
        "#!/bin/bash\necho reward done train_reward - - c; echo report done report - - -\n"
    )
    said = commands("pipeline.sh", "--account=lab").splitlines()
    assert said == [
        "submitted: - -",
        "reward: already done",
        "report: already done",
        "nothing to submit: all stages are done; --redo runs them again",
    ]
    assert "nothing to submit" not in commands("pipeline.sh", "--seeds", "1,2")


def test_few_cpus_are_pointed_out(commands):
    said = commands("reward.sbatch", SLURM_GPUS_ON_NODE="4", SLURM_CPUS_ON_NODE="1")
    assert "reward: 1 CPUs for 4 processes: slow; sbatch --cpus-per-task=32" in said
    assert "--cpus-per-task" not in next(line for line in said.splitlines() if line.startswith("srun "))


NODE = {"CONFIG": "c.yaml", "SEED": "", "SCRIPT": "s.py", "MASTER": "n1", "PORT": "1", "LOGS": "l", "SLURM_NODEID": "0"}


@pytest.mark.parametrize("engine", ["zero2", "zero3", "zero3_offload", "fsdp2"])
def test_an_engine_stays_on_one_process(commands, engine):
    said = commands("node.sh", WORLD="1", PROCESSES="1", ENGINE=engine, **NODE)
    assert "-m accelerate.commands.launch" in said
    assert f"--config_file accelerate_configs/{engine}.yaml" in said
    assert "--num_processes 1 " in said


@pytest.mark.parametrize("engine", ["", "cpu", "multi_cpu", "single_gpu", "multi_gpu"])
def test_one_process_without_an_engine_needs_no_launcher(commands, engine):
    said = commands("node.sh", WORLD="1", PROCESSES="1", ENGINE=engine, **NODE)
    assert "python s.py --config c.yaml" in said
    assert "accelerate.commands" not in said
    assert ("ACCELERATE_USE_CPU=true" in said) == engine.endswith("cpu")


def test_the_cpus_of_a_node_are_shared_between_its_processes(commands):
    more = NODE | {"WORLD": "4", "PROCESSES": "4", "ENGINE": "zero3_offload", "SLURM_CPUS_PER_TASK": "32"}
    assert "OMP_NUM_THREADS=8" in commands("node.sh", **more)
    assert "OMP_NUM_THREADS=3" in commands("node.sh", **more, OMP_NUM_THREADS="3")


@pytest.mark.parametrize(
    ("options", "settings", "cpus"),
    [
        (["--gres=gpu:4"], {}, 32),
        (["--gres", "gpu:h100:8"], {}, 64),
        (["--gres=tmp:3,gpu:2", "--nodes=2"], {}, 16),
        (["--gpus-per-node=3090:2"], {}, 16),
        (["--gres=gpu"], {}, 8),
        (["--gres=gpu:4"], {"RLHF_CPUS_PER_GPU": "6"}, 24),
        ([], {"SBATCH_GRES": "gpu:2"}, 16),
        (["--gres=gpu:4", "-c", "3"], {}, None),
        (["--gres=gpu:4", "--cpus-per-gpu=2"], {}, None),
        (["--nodes=2"], {}, None),
    ],
)
def test_jobs_ask_for_eight_cpus_a_gpu(commands, options, settings, cpus):
    said = commands("pipeline.sh", "--recipe", "gpt2-medium", "--run", "x", *options, **settings)
    jobs = [line for line in said.splitlines() if line.startswith("sbatch ")]
    assert len(jobs) == 6
    for job in jobs[:-1]:
        assert (f" --cpus-per-task={cpus} " in job) == (cpus is not None)
    assert "--cpus-per-task" not in jobs[-1]  # the report's


def test_the_warning_before_the_limit_is_a_setting(commands):
    def signals(*options, **settings):
        said = commands("pipeline.sh", "--recipe", "gpt2-medium", "--run", "x", *options, **settings)
        return [line for line in said.splitlines() if line.startswith("sbatch ")], said

    jobs, _ = signals(RLHF_SIGNAL_SECONDS="900")
    assert ["--signal=B:USR1@900" in job for job in jobs] == [True] * 5 + [False]
    jobs, _ = signals("--signal=B:USR1@60", RLHF_SIGNAL_SECONDS="900")
    assert all(job.index("@900") < job.index("@60") for job in jobs[:-1])  # the last one counts
    assert (
        "error: RLHF_SIGNAL_SECONDS: expected a number of at least 1, found soon"
        in signals(RLHF_SIGNAL_SECONDS="soon")[1]
    )


def submitted(said):
    """Stage -> the stages that its job waits for. Needs job ids that count from 1: see `counting`."""
    jobs = re.findall(r"^sbatch .*$", said, re.MULTILINE)
    names = [job.rpartition("/")[2].removesuffix(".sbatch") for job in jobs]
    waits = [re.search(r"--dependency=\w+:([\d:]+)", job) for job in jobs]
    return {n: [names[int(i) - 1] for i in w[1].split(":")] if w else [] for n, w in zip(names, waits, strict=True)}


@pytest.fixture
def counting(commands, tmp_path):
    """As `commands`, with an sbatch that counts its jobs from 1."""
    counter = 'echo "sbatch $*" >&2; echo x >> "$COUNT"; wc -l < "$COUNT"'
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/bash\n{counter}\n")
    return lambda *argv, **settings: commands(*argv, **settings | {"COUNT": str(tmp_path / "count")})


def test_the_jobs_are_those_of_the_stage_graph(counting):
    """slurm/pipeline.sh, a job file for each stage, and rlhf.storage.stages say the same."""
    graph = submitted(counting("pipeline.sh", "--recipe", "demo", "--run", "x"))
    expected = {spec.name: list(spec.needs) for spec in stages_of(RECIPES / "demo")}
    assert graph == expected
    assert list(expected) == [*STAGES, "report"]
    assert {path.stem for path in (ROOT / "slurm").glob("*.sbatch")} == set(expected)


def test_a_job_waits_only_for_stages_that_are_not_done(counting, tmp_path):
    for stage in ("reward", "ppo_lora"):
        (tmp_path / "runs" / "x" / stage).mkdir(parents=True)
        (tmp_path / "runs" / "x" / stage / "run.json").write_text('{"status":"done"}')  # as compact JSON, too
    said = counting("pipeline.sh", "--recipe", "demo", "--run", "x")
    assert submitted(said) == {
        "reward_gold": [],
        "ppo_full": [],
        "evaluation": ["reward_gold", "ppo_full"],
        "report": ["evaluation"],
    }
    assert said.count("already done") == 2


def test_a_stage_that_a_recipe_lacks_is_not_submitted(counting, tmp_path):
    recipe = tmp_path / "a recipe"
    recipe.mkdir()
    for stage in ("reward", "ppo_full"):
        (recipe / f"{stage}.yaml").write_text("{}")
    said = counting("pipeline.sh", "--recipe", str(recipe), "--run", "x")
    assert submitted(said) == {"reward": [], "ppo_full": ["reward"], "report": ["ppo_full"]}


@pytest.mark.parametrize(
    ("stage", "command", "seed"),
    [("reward", "train_reward", "3"), ("reward_gold", "train_reward", "1003"), ("evaluation", "evaluate", "")],
)
def test_a_job_runs_its_stage_with_the_seed_of_its_run(commands, tmp_path, stage, command, seed):
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\necho "$SCRIPT, seed $SEED, $CONFIG"\n')
    said = commands(f"{stage}.sbatch", SLURM_ARRAY_TASK_ID="3")
    assert f"scripts/{command}.py, seed {seed}, {RECIPES / 'demo' / stage}.yaml" in said
    assert f"{stage}: not_run, code 0" in said


def test_a_job_of_a_stage_that_is_done_ends_at_once(commands, tmp_path):
    (tmp_path / "runs" / "x" / "reward").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "reward" / "run.json").write_text('{"status":"done"}')
    said = commands("reward.sbatch")
    assert "reward: already done" in said
    assert "srun" not in said
