"""FSDP2 by Accelerate on CPU processes: in the place of a script, `fsdp_cpu.py SCRIPT ARGUMENTS`, or `apply` at first.

Accelerate makes FSDP of several GPU processes only, though torch's `fully_shard` works on gloo.
"""

import os
import runpy
import sys
from pathlib import Path

import torch.distributed
from accelerate.state import DistributedType, PartialState


def apply() -> None:
    """From here on this process and its like are taken for GPU processes, that compute on the CPU, by gloo."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ.pop("ACCELERATE_USE_CPU", None)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


if __name__ == "__main__":
    apply()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
