"""Trackers get project and run name from the arguments; rows and events are kept up to the resumed step."""

import json
import os
import uuid
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType, ProjectConfiguration
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

from rlhf.config import PPOConfig
from rlhf.tracking import recorder as tracking
from rlhf.tracking.recorder import Recorder, keep_events, keep_rows, load_rows, one_tracker_run, write_summary
from rlhf.tracking.skipped_updates import Skips, skip_line


class Run:
    """Stands for a tracker's own run object."""

    def __init__(self):
        self.info = SimpleNamespace(run_id=uuid.uuid4().hex)

    def set_name(self, name):
        self.name = name


class Fake(GeneralTracker):
    """Records the arguments with which Accelerate starts it."""

    name, requires_logging_directory, main_process_only = "", False, True
    started = []  # noqa: RUF012

    def __init__(self, project, *folder, **options):
        super().__init__()
        self.run = Run()
        Fake.started.append((self.name, project, options, self.run))

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.run.config = values

    def log(self, values, step=None, **_):
        pass

    @property
    def tracker(self):
        return self.run


def started(folder, monkeypatch, name, step=0, **options):
    """The arguments with which the tracker of that name, and TensorBoard, are started."""
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
    recorder.start(args, step)
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
    assert ("experiment" in options) == (name == "aim")  # its word for a project
    (events,) = {path.parent for path in tmp_path.rglob("events*") if path.parent.name == "first"}
    assert events == tmp_path / "tensorboard" / "first"  # TensorBoard calls a run by its folder


@pytest.mark.parametrize("run_name", [None, "first"])
def test_a_run_that_goes_on_stays_one_run_in_the_trackers(tmp_path, monkeypatch, run_name):
    def options(name, folder, step):
        return started(tmp_path / folder, monkeypatch, name, step, run_name=run_name)[2]

    first, later = options("wandb", "a", 0), options("wandb", "a", 4)
    assert first["resume"] == later["resume"] == "allow"
    assert first["id"] == later["id"]
    assert options("wandb", "a", 0)["id"] != first["id"]  # from its start: another run
    assert options("wandb", "b", 0)["id"] != first["id"]
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert not {"id", "resume"} & options("wandb", "a", 4).keys()
    first, later = options("trackio", "a", 0), options("trackio", "a", 4)
    assert (first["resume"], later["resume"]) == ("never", "allow")
    assert first["name"] == later["name"]
    assert first["name"] == "first" if run_name else first["name"].startswith("a-")
    old, new, later = (started(tmp_path / "c", monkeypatch, "mlflow", step, run_name=run_name) for step in (0, 0, 4))
    assert "run_id" not in old[2].keys() | new[2].keys()
    assert later[2]["run_id"] == new[3].info.run_id
    assert new[3].config["project"] == "kindness"
    assert (new[3].config["learning_rate"], new[3].config["score_clip"]) == (3e-6, "None")
    assert not hasattr(later[3], "config")  # MLflow refuses other settings than a run began with


def test_the_same_for_transformers_trainer(tmp_path, monkeypatch):
    def inside(step, report_to):
        args = SimpleNamespace(report_to=report_to, run_name=None)
        with one_tracker_run(args, tmp_path, step):
            return os.environ.get("WANDB_RUN_ID"), os.environ.get("WANDB_RESUME"), args.run_name

    monkeypatch.setenv("WANDB_RESUME", "must")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    assert inside(0, ["tensorboard"]) == (None, "must", None)
    run_id, resume, name = inside(0, ["wandb", "trackio"])
    assert resume == "allow"
    assert inside(3, ["wandb", "trackio"]) == (run_id, resume, name)
    assert inside(3, ["trackio"]) == (None, "must", name)
    assert inside(0, ["wandb"])[0] != run_id
    assert inside(0, ["wandb"])[2] is None
    assert (os.environ.get("WANDB_RUN_ID"), os.environ["WANDB_RESUME"]) == (None, "must")


@pytest.mark.parametrize(("run_name", "folder"), [(None, "."), ("../../up", "_.._up"), ("/root", "_root"), ("..", ".")])
def test_tensorboard_stays_in_the_runs_folder(tmp_path, monkeypatch, run_name, folder):
    run = tmp_path / "runs" / "run"
    started(run, monkeypatch, "wandb", run_name=run_name)
    assert list((run / "tensorboard" / folder).glob("events*"))
    assert [path.name for path in (*tmp_path.iterdir(), *run.parent.iterdir())] == ["runs", "run"]


def values(board):
    """(tag, step, value) of all scalars in all files of a folder, in no order of files."""
    found = []
    for path in board.glob("events.*"):
        for event in EventFileLoader(str(path)).Load():
            found += [(v.tag, event.step, v.tensor.float_val[0]) for v in event.summary.value if v.tensor.float_val]
    return sorted(found)


def texts(board):
    """Tag -> (step, text) of all texts."""
    shown = EventAccumulator(str(board), {"tensors": 0}).Reload()
    return {
        tag.removesuffix("/text_summary"): [
            (one.step, one.tensor_proto.string_val[0].decode()) for one in shown.Tensors(tag)
        ]
        for tag in shown.Tags()["tensors"]
        if tag.endswith("/text_summary")
    }


def written(board, steps, **options):
    with SummaryWriter(str(board), **options) as writer:
        for step in steps:
            writer.add_scalar("x", 10.0 * step, step)


def test_values_of_later_steps_and_one_that_was_cut_off_go(tmp_path):
    written(tmp_path, range(1, 6))
    written(tmp_path, range(4, 8))  # a second start, from step 3
    (first, second) = sorted(tmp_path.glob("events.*"))
    with second.open("ab") as file:
        file.write(b"\x18\x00\x00\x00\x00\x00\x00\x00half")
    keep_events(tmp_path, 3)
    assert values(tmp_path) == [("x", 1, 10.0), ("x", 2, 20.0), ("x", 3, 30.0)]
    assert [path.name for path in sorted(tmp_path.iterdir())] == [first.name, second.name]


def test_a_file_of_which_no_value_is_kept_is_still_one_of_tensorboard(tmp_path):
    written(tmp_path, range(1, 3))
    keep_events(tmp_path, -1)
    (path,) = tmp_path.glob("events.*")
    assert [event.file_version for event in EventFileLoader(str(path)).Load()] == ["brain.Event:2"]


def test_tensorboard_itself_reads_what_is_kept_whatever_the_clock_said(tmp_path, monkeypatch):
    written(tmp_path, range(1, 6))
    keep_events(tmp_path, 3)
    monkeypatch.setattr("time.time", lambda: 1000.0)  # the new file's name comes before the old one's
    written(tmp_path, range(4, 7))
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("x")
    assert sorted((point.step, point.value) for point in shown) == [(step, 10.0 * step) for step in range(1, 7)]


def test_the_row_that_sums_a_run_up_is_written_anew_by_who_goes_on(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for tag in ("train/loss", "train/train_loss", "train/train_runtime", "train/total_flos"):
            writer.add_scalar(tag, 1.0, 4)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n{"step": 4, "train_runtime": 1.0}\n')
    keep_events(tmp_path, 4)
    keep_rows(tmp_path / "metrics.jsonl", 4)
    assert values(tmp_path) == [("train/loss", 4, 1.0)]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 4, "loss": 1.0}\n'


def test_a_row_cut_inside_a_character_goes_and_the_others_stay_as_they_are(tmp_path):
    rows = [b'{"step": 1, "response": "a\xe2\x80\xa8b"}', '{"step": 2, "response": "Ä"}'.encode()]
    torn = '{"step": 2, "response": "漢'.encode()[:-1]
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"\n".join([*rows, torn]))
    keep_rows(path, 2)
    assert path.read_bytes() == b"\n".join([*rows, b""])


def test_rows_of_a_checkpoint_take_the_place_of_all_that_are_there(tmp_path):
    """Those of another history, too: a file that the checkpoint does not have goes."""
    folder, checkpoint = tmp_path / "run", tmp_path / "step-2"
    for place, files in ((folder, ("metrics", "warnings")), (checkpoint, ("metrics", "samples"))):
        place.mkdir()
        for name in files:
            (place / f"{name}.jsonl").write_text(f'{{"step": 1, "of": "{place.name}"}}\n')
    load_rows(folder, checkpoint)
    assert {path.name: json.loads(path.read_text())["of"] for path in folder.iterdir()} == {
        "metrics.jsonl": "step-2",
        "samples.jsonl": "step-2",
    }


def test_events_are_on_the_disk_before_they_take_the_place_of_the_old_ones(tmp_path, monkeypatch):
    written(tmp_path, range(1, 3))
    (path,) = tmp_path.glob("events.*")
    done, flushed, replaced = [], tracking.flush, os.replace
    monkeypatch.setattr(tracking, "flush", lambda path: (done.append(("flush", path.name)), flushed(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("replace", b.name)), replaced(a, b)))
    keep_events(tmp_path, 1)
    assert done == [("flush", f".{path.name}"), ("replace", path.name)]
    assert values(tmp_path) == [("x", 1, 10.0)]


def test_what_is_printed_of_an_event_does_not_steer_a_terminal(tmp_path, capsys):
    row = {"prompt_id": "a\x1b[2J\nerror: b\x9b", "scores": {"half": "inf"}}
    recorder = Recorder(Accelerator(cpu=True), tmp_path)
    skips = Skips(2, lambda left: recorder.event("skipped.jsonl", left, skip_line(left)))
    skips.report(1, ["score"], [row])
    said = capsys.readouterr().out
    assert said == (
        r"! step 1: update skipped: score not finite, prompts a\x1b[2J error: b\x9b (half inf); see skipped.jsonl"
        "\n"
    )
    assert json.loads((tmp_path / "skipped.jsonl").read_text())["rows"] == [row]  # there it is what it is


def test_a_stages_one_result_is_there_once(tmp_path):
    for number in (1.0, 2.0):
        write_summary(tmp_path, {"test/accuracy": number}, {"pair/0": "a\nb"}, {"seed": 3})
        keep_events(tmp_path / "tensorboard", 0)
    assert values(tmp_path / "tensorboard") == [("test/accuracy", 0, 2.0)]
    assert texts(tmp_path / "tensorboard") == {
        "pair/0": [(0, "    a\n    b")],
        "settings/all": [(0, '    {\n      "seed": 3\n    }')],
    }


@pytest.fixture
def recorder(tmp_path):
    """A recorder of a run that starts at a step."""

    def start(step):
        args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="tensorboard")
        project = ProjectConfiguration(project_dir=args.output_dir)
        found = Recorder(Accelerator(cpu=True, log_with=args.report_to, project_config=project), tmp_path)
        found.start(args, step)
        return found

    return start


def test_rows_and_samples_stand_at_their_step_and_go_on_behind_those_that_are_kept(tmp_path, recorder):
    responses = [{"prompt": "p", "response": "r", "score": 0.1236}, {"prompt": "q", "response": "s\nt", "score": 2.0}]
    first = recorder(0)
    for step in (1, 2, 3):
        first.row(step, {"x": 10.0 * step})
        first.samples(step, responses)
    first.evaluation(3, {"eval/y": 7.0})
    first.end()
    first.row(4, {"x": 40.0})  # no tracker is open any more
    board = tmp_path / "tensorboard"
    assert max(step for _, step, _ in values(board)) == 3
    again = recorder(2)
    again.row(3, {"x": 35.0})
    again.completions(responses)
    again.end()
    assert values(board) == [("progress/x", 1, 10.0), ("progress/x", 2, 20.0), ("progress/x", 3, 35.0)]
    assert texts(board)["samples/0"] == [
        (step, "    prompt: p\n    \n    response: r\n    \n    score: 0.124") for step in (1, 2)
    ]
    assert [step for step, _ in texts(board)["samples/1"]] == [1, 2]

    def rows(name):
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    assert rows("metrics.jsonl") == [{"step": step, "x": x} for step, x in ((1, 10.0), (2, 20.0), (3, 35.0))]
    assert rows("samples.jsonl") == [{"step": step, **row} for step in (1, 2) for row in responses]
    assert rows("eval_metrics.jsonl") == []
    assert rows("completions.jsonl") == responses


class OtherRank:
    """Stands for the accelerator of a rank whose trackers do nothing."""

    is_main_process, log_with, trackers = False, (), ()

    def init_trackers(self, *_, **__):
        pass

    log = init_trackers


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    checkpoint, folder = tmp_path / "step-1", tmp_path / "run"
    for place in (checkpoint, folder):
        place.mkdir()
        (place / "metrics.jsonl").write_text(f'{{"step": 7, "of": "{place.name}"}}\n')
    before = {path.name: path.read_text() for path in folder.iterdir()}
    other = Recorder(OtherRank(), folder)
    other.start(PPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", run_name="a"), 0)
    other.load(checkpoint)
    other.row(1, {"x": 1.0})
    other.evaluation(1, {"x": 1.0})
    other.completions([{"prompt": "p", "response": "r", "score": 1.0}])
    other.samples(1, [{"prompt": "p", "response": "r", "score": 1.0}])
    monkeypatch.setattr(tracking, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    other.event("skipped.jsonl", {"step": 1}, "a skipped update")
    with one_tracker_run(SimpleNamespace(report_to=["wandb", "trackio"], run_name=None), folder, 0):
        assert "WANDB_RESUME" not in os.environ
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_what_a_checkpoint_relies_on_is_on_the_disk(tmp_path, monkeypatch, recorder):
    flushed = []
    monkeypatch.setattr(tracking, "flush", lambda path: flushed.append(path.name))
    run, checkpoint = recorder(0), tmp_path / "step-1"
    checkpoint.mkdir()
    run.row(1, {"x": 1.0})
    run.event("warnings.jsonl", {"step": 1, "seen": "x"}, "a warning")
    run.event("skipped.jsonl", {"step": 1}, "a skipped update")
    flushed.clear()
    run.save(checkpoint)
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    assert flushed == [events.name]
    assert values(tmp_path / "tensorboard") == [("progress/x", 1, 1.0)]
    names = {"metrics.jsonl", "warnings.jsonl", "skipped.jsonl"}
    assert {path.name for path in checkpoint.iterdir()} == names
    for name in names:
        assert (checkpoint / name).read_text() == (tmp_path / name).read_text() != ""
    run.end()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"x": 5}\n')
    recorder(0).end()  # another run from its start
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert (tmp_path / "skipped.jsonl").read_text() == ""
