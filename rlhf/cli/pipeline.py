"""Run all stages of a recipe, one after another: rlhf pipeline --recipe NAME --run NAME.

Stages that are done are skipped; one that was interrupted resumes; one that read what has changed since runs again.
Settings that differ from those of a stage that has begun are refused, or with --redo it runs again. --executor slurm
submits the stages as a chain of jobs, as slurm/pipeline.sh does.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from rlhf.cli.children import Start, answer, end_with_parent, forget_script_folder, forked, heard, launched, prepare
from rlhf.cli.engines import engine_file
from rlhf.cli.outcome import show_header, show_outcome
from rlhf.cli.parsing import parse, read_recipe
from rlhf.cli.plan import planned, refuse_differing
from rlhf.cli.script import run_script
from rlhf.config import PipelineConfig, RunConfig
from rlhf.config.caches import cache_folder
from rlhf.console import quiet, screen
from rlhf.errors import UserError
from rlhf.models.gguf import WHEEL_MODELS, is_converted
from rlhf.storage.basis import report_holds
from rlhf.storage.stages import REPORT, StageSpec, changed_stages, is_done, read_run, recipe_folder, stages_of

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    run, config = parse([RunConfig, PipelineConfig])
    recipe = recipe_folder(config.recipe)
    if config.engine is not None:
        engine_file(config.engine)  # a UserError if there is none
    if config.executor == "slurm":
        _submit(run, config)
        return
    seeds = config.seed_list()
    if seeds and run.run == RunConfig.run:
        raise UserError(f"run: give --run a name for these runs, not {run.run!r}")
    runs = {seed: replace(run, run=f"{run.run}-seed{seed}") for seed in seeds} or {config.seed: run}
    if not config.redo:  # of all runs, before anything starts
        refuse_differing([stage for seed, one in runs.items() for stage in planned(recipe, one.folder(), seed)])
    for seed, one in runs.items():
        if seeds:
            screen.say(f"Run {one.run}", "bold")
        _run_all(one, recipe, seed, config)
        _report(one)
        show_outcome(one)
    if len(seeds) > 1:
        _report(run, list(runs.values()))


def _run_all(run: RunConfig, recipe: Path, seed: int | None, config: PipelineConfig) -> None:
    """All stages whose results do not hold, in order."""
    folder = run.folder()
    stages = stages_of(recipe)[:-1]
    start: Start | None = None
    lines: list[str] = []  # about stages that are done
    for number in range(len(stages)):
        plan = planned(recipe, folder, seed)  # now: the stages before it may just have run
        stage = plan[number]
        name, place = stage.spec.name, f"{number + 1}/{len(stages)}"
        if stage.state == "done":
            lines.append(f"[{place}] {stage.spec.title}: already done")
            continue
        left = [one.spec for one in plan[:-1] if one.state != "done"]
        start = start or _starter(run, config, left)  # which prints the header
        while lines:
            screen.say(lines.pop(0))
        if stage.state == "stale":
            changed = " and ".join(changed_stages(folder / name))
            screen.say(f"[{place}] {stage.spec.title}: again, since {changed} changed")
        argv = ["--config", str(stage.config), *_where(run), *stage.flags, *(["--redo"] if stage.differs else [])]
        _check(start(stage.spec.command, argv, {screen.STAGE: place}), name)
        if not is_done(folder / name):  # told to stop by a signal, which the stage has said
            sys.exit(1)
        if heard:  # when all of it was done
            sys.exit(f"{name}: done, then told to stop; run the same command again to go on")
    for line in lines:
        screen.say(line)


def _where(run: RunConfig) -> list[str]:
    return ["--run", run.run, "--runs_dir", run.runs_dir]


def _report(run: RunConfig, of: Sequence[RunConfig] = ()) -> None:
    """The report on a run, or on several, if what it is made of has changed; its heading stays."""
    folder = run.folder()
    if report_holds(folder, [one.folder() for one in of]):
        screen.say(f"{'Report on all runs' if of else 'Report'}: nothing has changed since it was written")
        return
    facts = read_run(folder / REPORT.name)
    heading = [f"--{name}={value}" for name in ("title", "author") if (value := facts.get(name))]
    runs = ["--runs", *(one.run for one in of)] if of else []
    _check(forked(REPORT.command, [*_where(run), *heading, *runs], {screen.STAGE: "report"}), REPORT.name)


def _starter(run: RunConfig, config: PipelineConfig, stages: Sequence[StageSpec]) -> Start:
    """How these stages are run, after the header is printed: forked from this process, or by a launcher."""
    devices, folder, what = _devices(), run.folder(), Path(config.recipe).name
    name = config.engine or (
        "cpu" if devices == 0 else "single_gpu" if (config.num_processes or devices) == 1 else "multi_gpu"
    )
    engine = engine_file(name)
    processes = _processes(engine.stem, config.num_processes, devices)
    launcher = _launcher(engine, processes)
    if engine.stem != "cpu" or devices:  # what has looked for a GPU must not fork
        show_header(what, [f"engine {engine.stem}", *([f"{processes} processes"] if processes else [])], folder)
        return lambda command, argv, environment: launched(
            # Otherwise `-m` would import from the current folder first, and a random.py there would win.
            [*launcher, "-m", f"rlhf.cli.{command}", *argv],
            {"PYTHONSAFEPATH": "1", "RLHF_LAUNCHER": "pipeline"} | os.environ | environment,
        )
    quiet.log_to(folder / "logs", "pipeline")
    recipe = recipe_folder(config.recipe)
    with screen.busy("starting"), _model_meanwhile(recipe / f"{stages[0].name}.yaml"):
        forget_script_folder()
        prepare(dict.fromkeys(["foresight", *(stage.command for stage in stages), REPORT.command]))
    on, time = answer(lambda: import_module("rlhf.cli.foresight").foresee(recipe, stages, _where(run)))
    show_header(what, on, folder, time)
    return forked


@contextmanager
def _model_meanwhile(recipe: Path) -> Iterator[None]:
    """Download and convert the base model of this recipe in another process, if it comes in a wheel and is not here.

    What goes wrong there is said by the stage, which tries again.
    """
    fields = read_recipe(recipe)
    name = str(fields.get("model_name_or_path") or fields.get("base_model"))
    if name not in WHEEL_MODELS or is_converted(cache_folder() / WHEEL_MODELS[name].name):
        yield
        return
    code = f"from rlhf.models import gguf; gguf.wheel_model({name!r})"
    child = subprocess.Popen([sys.executable, "-P", "-c", code], preexec_fn=end_with_parent)
    try:
        yield
    finally:
        child.wait()


def _submit(run: RunConfig, config: PipelineConfig) -> None:
    if shutil.which("sbatch") is None:
        raise UserError("executor: sbatch is not installed on this machine; submit from a login node of the cluster")
    script = ROOT / "slurm" / "pipeline.sh"
    if not script.is_file():
        raise UserError("executor: Slurm's job files are in the repository: run scripts/pipeline.py there")
    command = ["bash", str(script), "--recipe", config.recipe, "--run", run.run]
    command += ["--seeds", config.seeds] if config.seeds else []
    command += ["--redo"] if config.redo else []
    if sys.prefix != sys.base_prefix:  # the jobs use the virtual environment that this runs in
        os.environ.setdefault("RLHF_VENV", sys.prefix)
    settings = {"RUNS_DIR": str(Path(run.runs_dir).absolute()), "RLHF_ENGINE": config.engine or ""}
    if config.num_processes is not None:
        settings["RLHF_PROCESSES"] = str(config.num_processes)
    code = subprocess.run([*command, *shlex.split(config.sbatch)], env=os.environ | settings, check=False).returncode
    if code:
        sys.exit(code)


def _processes(engine: str, asked: int | None, devices: int) -> int | None:
    """How many to start: as asked, or one per device; None to use the number in the engine's file.

    A UserError for several under an engine for one, and for more processes than devices.
    """
    if engine in ("cpu", "single_gpu"):
        if asked not in (None, 1):
            raise UserError(f"num_processes: expected 1 with engine {engine}, found {asked}; see multi_cpu, multi_gpu")
        return 1
    if engine == "multi_cpu" or devices == 0:
        return asked
    if asked is not None and asked > devices:
        raise UserError(f"num_processes: expected at most {devices}, one per device, found {asked}")
    return asked or devices


def _launcher(engine: Path, processes: int | None) -> list[str]:
    if engine.stem in ("cpu", "multi_cpu"):
        # For one process on the CPU, `accelerate launch` only sets this variable, and takes ten seconds for it.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if engine.stem == "cpu":
        return [sys.executable]
    if processes is not None and engine.stem != "multi_cpu":
        # The launcher's default is one thread per process: too few for an optimizer in main memory (zero3_offload).
        threads = max(1, (os.cpu_count() or 1) // processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(engine)]
    return command if processes is None else [*command, "--num_processes", str(processes)]


def _check(code: int, stage: str) -> None:
    """End with the stage's code if it has failed, or was interrupted before it could save anything."""
    if code in (128 + signal.SIGINT, -signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGHUP):
        screen.error(f"{stage}: interrupted; run the same command again to resume")
    elif code:
        screen.error(f"error: stage {stage} ended with code {code}; fix it and run the same command again to resume")
    if code:
        sys.exit(code if code > 0 else 128 - code)


def _devices() -> int:
    """The number of accelerators that processes on this machine see."""
    import torch  # not above: where all is done it is not needed

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


if __name__ == "__main__":
    run_script(main)
