"""Several ranks on one pretend device each: gloo carries what is sent, NCCL's rules hold for it (see pretend.py)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import queries
import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from torch.distributed import distributed_c10d


def join(limit: float) -> None:
    """Meet the other ranks, as the environment says. limit: seconds of a collective."""
    import datetime

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=limit))
    PartialState._prepare_backend = lambda *_, **__: ("nccl", DistributedType.MULTI_GPU)
    # Objects travel on the device, as with NCCL.
    distributed_c10d._get_object_coll_device = lambda *_: str(queries.device())
    torch.nn.parallel.DistributedDataParallel = DataParallel


class DataParallel(torch.nn.Module):
    """In the place of DistributedDataParallel, whose C++ part wants real memory: gradients are averaged one by one."""

    def __init__(self, module: torch.nn.Module, **_: Any) -> None:
        super().__init__()
        self.module, self.synchronises = module, True
        with torch.no_grad():
            for parameter in module.parameters():
                dist.broadcast(parameter, 0)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._average)

    def _average(self, parameter: torch.Tensor) -> None:
        if self.synchronises:
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(dist.get_world_size())

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients only add up inside."""
        self.synchronises = False
        try:
            yield
        finally:
            self.synchronises = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
