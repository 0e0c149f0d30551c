"""The processes that the launcher has started, and the devices that they may use."""

import os

from rlhf.errors import UserError


def process_count() -> int:
    """How many processes the launcher has started on all machines."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_process_count() -> int:
    """How many of them it has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def cpu_is_asked_for() -> bool:
    """Whether the launcher asks for the CPU, for example by use_cpu in its config."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "on", "y", "t")


def check_device_count(use_cpu: bool) -> None:
    """A UserError if more processes were started on this machine than it has devices."""
    import torch  # not above: the help of commands does without

    processes = local_process_count()
    if use_cpu or not torch.accelerator.is_available():
        return
    devices = torch.accelerator.device_count()
    if processes > devices:
        raise UserError(
            f"processes: expected at most {devices} on this machine, one per visible device, found {processes}: "
            f"use accelerate launch --num_processes {devices}, or check CUDA_VISIBLE_DEVICES"
        )
