"""Trackers get the project and the name of the run that the arguments give."""

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType, ProjectConfiguration

from rlhf.config import PPOConfig
from rlhf.runtime.tracking import Recorder


class Run:
    """In the place of a tracker's own run."""

    def set_name(self, name):
        self.name = name


class Fake(GeneralTracker):
    """Keeps what Accelerate starts it with."""

    name, requires_logging_directory, main_process_only = "", False, True
    started = []  # noqa: RUF012

    def __init__(self, project, *folder, **options):
        super().__init__()
        self.run = Run()
        Fake.started.append((self.name, project, options, self.run))

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
        pass

    @property
    def tracker(self):
        return self.run


def started(folder, monkeypatch, name, **options):
    """What the tracker of that name, and TensorBoard beside it, are started with."""
    fake = type("Fake_" + name, (Fake,), {"name": name, "requires_logging_directory": name == "aim"})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, fake)
    there = [LoggerType("tensorboard"), LoggerType(name)]
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: there)
    monkeypatch.setattr("rlhf.config.trackers.get_available_trackers", lambda: there)
    args = PPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=["tensorboard", name], project="kindness", **options
    )
    accelerator = Accelerator(
        cpu=True, log_with=args.report_to, project_config=ProjectConfiguration(project_dir=args.output_dir)
    )
    recorder = Recorder(accelerator, folder)
    Fake.started.clear()
    recorder.start(args, 0)
    recorder.row(1, {"x": 1.0})
    recorder.end()
    return Fake.started[0]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("wandb", "name"),
        ("trackio", "name"),
        ("mlflow", "run_name"),
        ("swanlab", "experiment_name"),
        ("clearml", "task_name"),
        ("dvclive", "exp_name"),
        ("comet_ml", None),
        ("aim", None),
    ],
)
def test_project_and_run_name_reach_every_tracker(tmp_path, monkeypatch, name, key):
    _, project, options, run = started(tmp_path, monkeypatch, name, run_name="first")
    assert project == "kindness"
    assert options.get(key) == "first" if key else run.name == "first"
    assert options.get("experiment", "kindness") == "kindness"
    (events,) = {path.parent for path in tmp_path.rglob("events*") if path.parent.name == "first"}
    assert events == tmp_path / "tensorboard" / "first"  # TensorBoard calls a run by its folder


@pytest.mark.parametrize(("run_name", "folder"), [(None, "."), ("../../up", "_.._up"), ("/root", "_root"), ("..", ".")])
def test_tensorboard_stays_in_the_runs_folder(tmp_path, monkeypatch, run_name, folder):
    run = tmp_path / "runs" / "run"
    started(run, monkeypatch, "wandb", run_name=run_name)
    assert list((run / "tensorboard" / folder).glob("events*"))
    assert [path.name for path in (*tmp_path.iterdir(), *run.parent.iterdir())] == ["runs", "run"]
