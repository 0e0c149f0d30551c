"""Responses on the disk as they come, so that an evaluation that was interrupted continues where it was."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from accelerate import PartialState

from rlhf.data.oasst import TextPrompt
from rlhf.distributed.collectives import all_rows, from_main
from rlhf.file_types import ResponseRow
from rlhf.storage.disk import writing
from rlhf.storage.run_folder import write_rows
from rlhf.storage.stages import ANSWERED


class Answered:
    """The rows of ANSWERED in a stage's folder; they have the set of their prompts beside the fields of a response.

    All processes read the same rows and hand in theirs together; rank 0 writes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ANSWERED
        self.rows: dict[tuple[str, str, str], ResponseRow] = {}
        for set_name, row in from_main(self._read):
            self.rows[set_name, row["model"], row["prompt_id"]] = row

    def _read(self) -> list[tuple[str, ResponseRow]]:
        """Rows so far; an incomplete last line goes."""
        found = []
        for line in self.path.read_bytes().split(b"\n") if self.path.exists() else []:
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError:
                continue
            found.append(row)
        if found:
            write_rows(self.path, found)
        return [(row.pop("set"), cast(ResponseRow, row)) for row in found]

    def of(self, set_name: str, model: str, prompts: Sequence[TextPrompt]) -> dict[str, ResponseRow]:
        """What the model has answered to these prompts so far, by prompt id."""
        keys = [(set_name, model, prompt.prompt_id) for prompt in prompts]
        return {key[2]: self.rows[key] for key in keys if key in self.rows}

    def add(self, set_name: str, rows: Sequence[ResponseRow]) -> None:
        """Rows of this process, of one batch; all processes call it."""
        everyone = all_rows(rows)
        if PartialState().is_main_process:
            lines = [json.dumps({"set": set_name, **row}, ensure_ascii=False) + "\n" for row in everyone]
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))

    def remove(self) -> None:
        """After the rows are where they stay."""
        if PartialState().is_main_process:
            self.path.unlink(missing_ok=True)
