"""Writes checkpoints of a PPO run: the files at once, and the rest in the background while training continues."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from accelerate import Accelerator

from rlhf.distributed.collectives import all_rows, from_main, on_all
from rlhf.distributed.launch import is_deepspeed, is_fsdp
from rlhf.distributed.sharded_state import save_state
from rlhf.distributed.trained_weights import without_frozen_weights
from rlhf.storage.checkpoint import PPO, SAVE_ERRORS, not_written, remove, rotate, run_facts, write_step
from rlhf.storage.disk import flush, write_manifest

_SEEN_WITHIN = 60.0  # seconds after which a network file system shows what another machine has written


class Saver:
    """Writes FOLDER/checkpoints/step-N: trained weights, optimizer, scheduler, scaler, KL coefficient, random states.

    Before `write` returns, all ranks have written their files to a temporary folder. A thread of rank 0 then computes
    the manifest, flushes, renames the folder and deletes older checkpoints, one checkpoint at a time. Outside the
    `with` block `write` waits for the thread. An error in the thread ends the run on all ranks at the next `check`. If
    the run is killed before the rename, the previous checkpoint stays the newest.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, trained: torch.nn.Module) -> None:
        """trained: the model before Accelerate prepared it."""
        self.accelerator, self.parent, self.trained = accelerator, folder / "checkpoints", trained
        self.step = 0  # of the last checkpoint written in the block
        self._since = time.monotonic()  # time of the last checkpoint, or of the start; rank 0's counts
        self._in_block = self._pending = False  # the same on all ranks
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None

    def __enter__(self) -> "Saver":
        self.step, self._since, self._in_block = 0, time.monotonic(), True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._in_block = False
        if error is None:
            self.check(wait=True)
        elif self._thread is not None:  # the user gets the error that ended the run
            self._thread.join()
            self._pending, self._problem = False, None

    def is_due(self, minutes: float) -> bool:
        """Whether that many minutes have passed since the last checkpoint, by rank 0's clock."""
        return from_main(lambda: time.monotonic() - self._since >= 60 * minutes)

    def write(
        self,
        step: int,
        limit: int | None,
        facts: Mapping[str, object],
        write_more: Callable[[Path], None],
        wait: bool = False,
        best: str | None = None,
    ) -> None:
        """Write the checkpoint of a step; a UserError if that fails.

        limit: checkpoints to keep; older ones but `best` are deleted once this one is complete. facts: for step.json.
        write_more: writes further files on rank 0. wait: return only when all of this is done.
        """
        self.check(wait=True)
        accelerator, main = self.accelerator, self.accelerator.is_main_process
        alone = is_deepspeed(accelerator) or is_fsdp(accelerator)
        target, aside = self.parent / f"{PPO}{step}", self.parent / f".{PPO}{step}"
        if main:
            for old in self.parent.glob(f".{PPO}*"):  # left by a run that was killed while it wrote or deleted one
                shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()

        def write() -> None:
            self._write_files(aside)
            if main:
                write_step(aside, step, {**facts, **run_facts(accelerator)})
                write_more(aside)

        try:
            # Engines use collectives of their own here: the other ranks wait in one of them, and end with this rank.
            write() if alone else on_all(write)
        except BaseException as error:
            if main or alone:
                shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, SAVE_ERRORS):
                raise not_written(target, error) from error
            raise
        names = set(all_rows([path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()]))
        self.step, self._since, self._pending = step, time.monotonic(), True
        if main:
            self._thread = threading.Thread(target=self._complete, args=(aside, target, limit, names, best))
            self._thread.start()
        self.check(wait=wait or not self._in_block)

    def _write_files(self, aside: Path) -> None:
        os.makedirs(aside, exist_ok=True)
        if is_fsdp(self.accelerator):
            save_state(self.accelerator, aside)
            return
        options = {"exclude_frozen_parameters": True} if is_deepspeed(self.accelerator) else {}
        with without_frozen_weights(self.trained):
            save_state(self.accelerator, aside, **options)

    def _complete(self, aside: Path, target: Path, limit: int | None, names: set[str], best: str | None) -> None:
        try:
            try:
                wait_to_see(aside, names)
                write_manifest(aside)
                remove(target)
                os.replace(aside, target)
                flush(target.parent)
            except OSError as error:
                shutil.rmtree(aside, ignore_errors=True)
                raise not_written(target, error) from error
            rotate(target, PPO, limit, best)
        except Exception as error:
            self._problem = error

    def check(self, wait: bool = False) -> None:
        """End all ranks if the last checkpoint could not be completed; call it on all ranks at the same time.

        wait: until it is complete. One collective if that is not known yet, none otherwise.
        """
        if self._pending:
            self._pending = False
            self._pending = not from_main(lambda: self._is_complete(wait))

    def _is_complete(self, wait: bool) -> bool:
        assert self._thread is not None
        if wait:
            self._thread.join()
        if self._thread.is_alive():
            return False
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem
        return True


def wait_to_see(folder: Path, names: Iterable[str], within: float = _SEEN_WITHIN) -> None:
    """Wait until all these files, some written by other machines, are visible; an OSError after `within` seconds."""
    end = time.monotonic() + within
    while missing := sorted(name for name in names if not (folder / name).is_file()):
        if time.monotonic() >= end:
            raise OSError(0, f"no {missing[0]}, which another process has written", str(folder))
        os.listdir(folder)  # listing the folder makes a network file system refresh it
        time.sleep(min(1.0, within))
