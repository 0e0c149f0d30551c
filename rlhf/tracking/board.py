"""What TensorBoard shows of a stage: one run, the numbers that matter first, sample texts before settings.

TensorBoard sorts groups of scalars and texts by name; metrics.jsonl and other trackers keep the names of the metrics.
"""

import json
from pathlib import Path
from typing import Any

from accelerate.tracking import TensorBoardTracker, on_main_process
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import rewrite_logs

from rlhf.file_types import Settings

_MOVED = {"loss/policy_avg": "policy/loss_avg", "loss/value_avg": "value/loss_avg"}


def board_tag(name: str) -> str:
    """A metric's name on the board: `objective/...` comes first, speed and progress after what is learned."""
    group, slash, last = name.partition("/")
    if not slash or last == "epoch":  # alone on top otherwise
        return f"progress/{last or group}"
    if last.endswith(("runtime", "per_second")) and group != "perf":
        return f"perf/{group}_{last}"
    return _MOVED.get(name, name)


def add_settings(writer: SummaryWriter, settings: Settings) -> None:
    """The stage's settings, as a text."""
    writer.add_text("settings/all", verbatim(json.dumps(settings, indent=2, default=str)), 0)


def verbatim(text: str) -> str:
    """Markdown that shows text literally: every line is indented by four blanks."""
    return "    " + text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\n    ")


class Board(TensorBoardTracker):
    """Accelerate's TensorBoard tracker; it would write the settings to two more runs, with the time as their names."""

    @on_main_process
    def store_init_configuration(self, values: Settings) -> None:
        """Called once, at the start."""
        add_settings(self.writer, values)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """A row of metrics."""
        super().log({board_tag(name): value for name, value in values.items()}, step, **kwargs)


class BoardCallback(TrainerCallback):
    """For transformers' Trainer, in place of its own TensorBoardCallback: with the tags of `board_tag`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the settings; the model's are in config.json."""
        if state.is_world_process_zero:
            self.writer = SummaryWriter(str(self.folder))
            add_settings(self.writer, args.to_dict())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write a row of metrics; not the Trainer's summary at its end, one value each for all steps."""
        if self.writer is not None and logs and "train_runtime" not in logs:
            for name, value in rewrite_logs(logs).items():
                self.writer.add_scalar(board_tag(name), value, state.global_step)
            self.writer.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
