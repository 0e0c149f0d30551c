"""FSDP2 by Accelerate on CPU processes, which it makes of GPU processes only, though torch's works on gloo, too."""

import os

import torch.distributed
from accelerate.state import DistributedType, PartialState


def apply() -> None:
    """From here on Accelerate takes this process, one of those launched, for one on a GPU, whose device is the CPU."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ.pop("ACCELERATE_USE_CPU", None)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
