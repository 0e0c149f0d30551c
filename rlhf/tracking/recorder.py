"""Writes metrics and samples to metrics.jsonl, samples.jsonl and the trackers in report_to."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainingArguments

from rlhf.console import screen
from rlhf.file_types import SKIPPED, WARNINGS, Completion, MetricsRow, Settings
from rlhf.storage.disk import flush, writing
from rlhf.storage.run_folder import append_row, write_bytes, write_rows
from rlhf.tracking.board import Board, add_settings, verbatim

METRICS, SAMPLES, EVALUATIONS = "metrics.jsonl", "samples.jsonl", "eval_metrics.jsonl"

TRACKER_RUN = "tracker_run"  # the run's id in trackers that can go on with an earlier run

_FILES = (METRICS, SAMPLES, EVALUATIONS, SKIPPED, WARNINGS)  # one JSON row per line, each with its step

# Each tracker's argument for the name of the run.
_RUN_NAME = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
    "dvclive": "exp_name",
}


class Recorder:
    """Writes on rank 0; on the other ranks it does nothing."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self.is_open = False  # between start and end
        self.wrote = False  # wrote a row, before `start` or after it

    def start(self, args: TrainingArguments, step: int) -> None:
        """Begin at `step`: remove rows of later steps, which an interrupted run has written.

        A run that starts at step 0 also removes earlier rows of step 0, unless it wrote them itself.
        """
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            last = step if step or self.wrote else -1
            for name in _FILES:
                keep_rows(self.folder / name, last)
            keep_events(self.folder / board_folder(args.run_name), last)
        # Trackers take numbers, booleans and texts; everything else becomes text.
        config = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in args.to_dict().items()}
        goes_on = goes_on_as(self.folder, args.run_name, step) if self.accelerator.is_main_process else {}
        self._init_trackers(args.project, args.run_name, config, goes_on)
        self.is_open = True

    def _init_trackers(
        self, project: str, run_name: str | None, config: Settings, goes_on: dict[str, dict[str, str]]
    ) -> None:
        # TensorBoard has no projects and names a run by its folder; Accelerate would use the project's name.
        board = Board("", self.folder / board_folder(run_name))
        accelerator = self.accelerator
        accelerator.log_with = [board if _is_board(tracker) else tracker for tracker in accelerator.log_with]
        options: dict[str, Any] = {"aim": {"experiment": project}}
        if run_name:
            options |= {tracker: {key: run_name} for tracker, key in _RUN_NAME.items()}
        for tracker, more in goes_on.items():
            options[tracker] = options.get(tracker, {}) | more
        accelerator.init_trackers(project, init_kwargs=options)
        for tracker in accelerator.trackers:
            if "run_id" not in options.get(tracker.name, {}):  # MLflow keeps the settings that a run began with
                tracker.store_init_configuration(config)
            if tracker.name == "mlflow" and accelerator.is_main_process:  # which made up the id
                path = self.folder / TRACKER_RUN
                write_bytes(path, f"{path.read_text().split()[0]} {tracker.tracker.info.run_id}".encode())
        if run_name and accelerator.is_main_process:
            for tracker in accelerator.trackers:
                if tracker.name == "comet_ml":
                    tracker.tracker.set_name(run_name)
                elif tracker.name == "aim":
                    tracker.tracker.name = run_name

    def save(self, checkpoint: Path) -> None:
        """Copy the rows so far into a checkpoint, and flush TensorBoard's files."""
        save_rows(self.folder, checkpoint)
        if any(tracker.name == "tensorboard" for tracker in self.accelerator.trackers):
            writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
            writer.flush()
            flush_events(Path(writer.log_dir))

    def load(self, checkpoint: Path) -> None:
        """Restore the rows that the checkpoint holds."""
        if self.accelerator.is_main_process:
            load_rows(self.folder, checkpoint)

    def row(self, step: int, row: MetricsRow) -> None:
        """One row of metrics."""
        self._row(METRICS, step, row)

    def evaluation(self, step: int, row: MetricsRow) -> None:
        """One evaluation's metrics, in eval_metrics.jsonl."""
        self._row(EVALUATIONS, step, row)

    def event(self, file: str, row: Mapping[str, Any], text: str) -> None:
        """A problem: a row of SKIPPED or WARNINGS, and a printed line."""
        write_event(self.folder / file, row, text)

    def _row(self, file: str, step: int, row: MetricsRow) -> None:
        self.wrote = True
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            append_row(self.folder / file, {"step": step, **row})
        if self.is_open:
            self.accelerator.log(row, step=step)

    def completions(self, rows: Sequence[Completion]) -> None:
        """Rows of completions.jsonl."""
        if self.accelerator.is_main_process:
            write_rows(self.folder / "completions.jsonl", rows)

    def samples(self, step: int, rows: Sequence[Completion]) -> None:
        """Sample responses of a step: rows with prompt, response, score."""
        if not self.accelerator.is_main_process:
            return
        for row in rows:
            append_row(self.folder / SAMPLES, {"step": step, **row})
        if any(tracker.name == "tensorboard" for tracker in self.accelerator.trackers):
            writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
            for i, row in enumerate(rows):
                text = f"prompt: {row['prompt']}\n\nresponse: {row['response']}\n\nscore: {row['score']:.3f}"
                writer.add_text(f"samples/{i}", verbatim(text), step)

    def end(self) -> None:
        """Flush and close the trackers; the process group stays."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.is_open = False


def goes_on_as(folder: Path, run_name: str | None, step: int) -> dict[str, dict[str, str]]:
    """Tracker -> options with which a run that was interrupted goes on as the same one. On rank 0.

    A run that starts at step 0 is a new one. W&B knows a run by its id, trackio by its name, MLflow by its own id.
    """
    path = folder / TRACKER_RUN
    if step == 0 or not path.exists():
        write_bytes(path, uuid.uuid4().hex[:12].encode())
    run_id, *of_mlflow = path.read_text().split()
    found = {"trackio": {"name": run_name or f"{folder.name}-{run_id}", "resume": "allow" if step else "never"}}
    if "WANDB_RUN_ID" not in os.environ:  # the user's own, which W&B reads
        found["wandb"] = {"id": run_id, "resume": "allow"}
    if of_mlflow:
        found["mlflow"] = {"run_id": of_mlflow[0]}
    return found


@contextmanager
def one_tracker_run(args: TrainingArguments, folder: Path, step: int) -> Iterator[None]:
    """The same for transformers' Trainer inside the block: its callbacks start the trackers, which read these names."""
    asked = {"wandb", "trackio"} & set(args.report_to or [])
    found = goes_on_as(folder, args.run_name, step) if asked and PartialState().is_main_process else {}
    if "trackio" in asked and found:
        args.run_name = found["trackio"]["name"]
    names = {"id": "WANDB_RUN_ID", "resume": "WANDB_RESUME"}
    new = {names[key]: value for key, value in found.get("wandb", {}).items()} if "wandb" in asked else {}
    before = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def _is_board(tracker: Any) -> bool:
    return str(tracker) == "tensorboard" or isinstance(tracker, TensorBoardTracker)  # the latter from an earlier start


def board_folder(run_name: str | None) -> str:
    """TensorBoard's folder in the run's folder: `tensorboard`, or `tensorboard/RUN_NAME`."""
    return os.path.join("tensorboard", (run_name or "").replace(os.sep, "_").strip("."))


def write_summary(folder: Path, numbers: dict[str, float], texts: dict[str, str], config: Settings) -> None:
    """Write TensorBoard scalars, texts and settings of a stage without steps; replaces earlier ones."""
    board = folder / "tensorboard"
    for old in board.glob("events.*.summary"):
        old.unlink()
    with SummaryWriter(str(board), filename_suffix=".summary") as writer:
        for name, number in numbers.items():
            writer.add_scalar(name, number, 0)
        for name, text in texts.items():
            writer.add_text(name, verbatim(text), 0)
        add_settings(writer, config)


def write_event(path: Path, row: Mapping[str, Any], text: str) -> None:
    """Append a row to a file and print a line, on rank 0."""
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        append_row(path, row)
        screen.warn(text)


def save_rows(folder: Path, checkpoint: Path) -> None:
    """Copy the rows so far into a checkpoint."""
    for name in _FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, checkpoint / name)


def load_rows(folder: Path, checkpoint: Path) -> None:
    """Restore the rows that the checkpoint holds."""
    for name in _FILES:
        if (checkpoint / name).exists():
            write_bytes(folder / name, (checkpoint / name).read_bytes())
        else:
            (folder / name).unlink(missing_ok=True)


def flush_events(board: Path) -> None:
    """Flush TensorBoard's files to the disk."""
    for path in board.glob("events.*"):
        flush(path)


def keep_rows(path: Path, last_step: int) -> None:
    """Drop rows after last_step, and an incomplete last line.

    Also drops the summary row of transformers' Trainer: a resumed run writes another.
    """
    if not path.exists():
        return
    kept = []
    # Not splitlines: it also splits at U+2028 and U+0085, which JSON leaves unescaped inside texts.
    # Bytes, because a line may end inside a character.
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError:
            continue
        if row.get("step", 0) <= last_step and "train_runtime" not in row:
            kept.append(line)
    write_bytes(path, b"".join(line + b"\n" for line in kept))


def keep_events(board: Path, last_step: int) -> None:
    """Drop TensorBoard's values after last_step, and an incomplete last record.

    TensorBoard's own purge_step relies on the order of file names, which contain a clock time.
    """
    for path in board.glob("events.*"):
        if not path.name.endswith(".summary"):
            records = list(RawEventFileLoader(str(path)).Load())
            ended = next((i for i, record in enumerate(records) if _sums_up(Event.FromString(record))), None)
            kept = [record for record in records[:ended] if _is_kept(Event.FromString(record), last_step)]
            aside = path.with_name(f".{path.name}")
            with writing(path):
                with aside.open("wb") as file:
                    for record in kept:
                        RecordWriter(file).write(record)
                flush(aside)
                os.replace(aside, path)


def _is_kept(event: Event, last_step: int) -> bool:
    return event.WhichOneof("what") != "summary" or event.step <= last_step


def _sums_up(event: Event) -> bool:
    """Whether it belongs to the summary row of transformers' Trainer: with the first such tag that row begins."""
    return any(value.tag.startswith("train/train_") for value in event.summary.value)
