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


def check_processes(use_cpu: bool) -> None:
    """A UserError for several processes that do not know how to meet, or have to share this machine's devices."""
    import torch  # not above: the help of commands does without

    needed = ("RANK", "MASTER_ADDR") if use_cpu else ("RANK", "MASTER_ADDR", "MASTER_PORT")
    unset = [name for name in needed if not os.environ.get(name)]
    if process_count() > 1 and unset:
        raise UserError(
            f"processes: WORLD_SIZE is {process_count()}, but {' and '.join(unset)} not set: start the script with "
            "accelerate launch, or set RANK to each process's number, and MASTER_ADDR and MASTER_PORT to where "
            "process 0 listens"
        )
    processes = local_process_count()
    if use_cpu or not torch.accelerator.is_available():
        return
    devices = torch.accelerator.device_count()
    if processes > devices:
        raise UserError(
            f"processes: expected at most {devices} on this machine, one per visible device, found {processes}: "
            f"use accelerate launch --num_processes {devices}, or check CUDA_VISIBLE_DEVICES"
        )
