"""The first lines of a stage: a header where no pipeline has printed one, and the head of its block."""

from pathlib import Path

import torch

from rlhf.cli.outcome import show_header
from rlhf.console import screen
from rlhf.distributed.devices import process_count
from rlhf.perf.hardware import device_name


def show_stage(title: str, facts: str, device: torch.device, precision: str | None, folder: Path) -> None:
    """precision: in words; None where nothing is trained. folder: of the run."""
    if not screen.is_part():
        threads, processes = torch.get_num_threads(), process_count()
        on = f"{threads} CPU thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device_name(device)
        on = f"{processes} processes, each on {on}" if processes > 1 else on
        show_header(folder.name, [on, *([precision] if precision else [])], folder)
    screen.stage(title, facts)
