"""A training stage that has begun keeps its precision: another machine would choose another one."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainingArguments

from rlhf.config.precision import give_reason
from rlhf.distributed.collectives import from_main, join_processes
from rlhf.storage.stages import read_run


def kept_precision(given: SimpleNamespace, stage: str) -> dict[str, bool]:
    """bf16 and fp16 as the stage began; nothing if it has not begun, or if one is given."""
    if given.bf16 is not None or given.fp16:
        return {}
    join_processes(given.ddp_timeout, given.use_cpu, given.ddp_backend)
    config = from_main(lambda: read_run(Path(given.runs_dir) / given.run / stage)).get("config", {})
    return {name: bool(config[name]) for name in ("bf16", "fp16") if config.get(name) is not None}


def says_so(settings: Iterable[Any]) -> None:
    """Give the kept precision as the reason, for run.json and the console."""
    for one in settings:
        if isinstance(one, TrainingArguments):
            give_reason(one, "as this run began")
