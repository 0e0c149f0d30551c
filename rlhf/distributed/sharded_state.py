"""Checkpoints of a run whose weights FSDP2 has sharded: each rank saves and loads its own part.

Accelerate reads its files of sharded weights by a pickle that may call any function, and cannot read back its files
of full weights. So it handles only the rest here: random states, loss scaler, registered objects.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from rlhf.distributed.collectives import as_part, local_part
from rlhf.distributed.launch import is_fsdp


def save_state(accelerator: Accelerator, folder: Path, **options: Any) -> None:
    """`Accelerator.save_state`, but under FSDP2 trained weights and optimizer go to shard-RANK.pt."""
    with _apart(accelerator) as parts:
        accelerator.save_state(str(folder), **options)
    for model, optimizer in parts:
        torch.save(_state(model, optimizer), _file(accelerator, folder))


def load_state(accelerator: Accelerator, folder: Path, **options: Any) -> None:
    """Load what `save_state` wrote on the same number of ranks; under FSDP2 without a collective.

    A ValueError or KeyError if the file belongs to other weights.
    """
    with _apart(accelerator) as parts:
        accelerator.load_state(str(folder), **options)
    for model, optimizer in parts:
        state = torch.load(_file(accelerator, folder), map_location="cpu", weights_only=True)
        _restore(model, optimizer, state)


@contextmanager
def _apart(accelerator: Accelerator) -> Iterator[list[tuple[nn.Module, Any]]]:
    """Under FSDP2: yield models and optimizers, hidden from the accelerator inside the block; otherwise yield []."""
    if not is_fsdp(accelerator):
        yield []
        return
    models, optimizers = accelerator._models, accelerator._optimizers
    accelerator._models, accelerator._optimizers = [], []
    try:
        yield list(zip(models, optimizers, strict=True))
    finally:
        accelerator._models, accelerator._optimizers = models, optimizers


def _file(accelerator: Accelerator, folder: Path) -> Path:
    return folder / f"shard-{accelerator.process_index}.pt"


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    state = optimizer.state_dict()
    moments = {
        number: {name: local_part(value) for name, value in entry.items()} for number, entry in state["state"].items()
    }
    weights = {name: local_part(parameter.detach()) for name, parameter in _trained(model).items()}
    return {"weights": weights, "moments": moments, "groups": state["param_groups"]}


@torch.no_grad()
def _restore(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    weights, trained = state["weights"], _trained(model)
    found, expected = ({name: tuple(local_part(x).shape) for name, x in given.items()} for given in (weights, trained))
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(f"weights with other names or shapes: {', '.join(odd[:3])}")
    groups = state["groups"]
    sizes = [[len(group["params"]) for group in given] for given in (groups, optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"an optimizer of {sizes[0]} weights, while this run has {sizes[1]}")
    for name, parameter in trained.items():
        local_part(parameter).copy_(weights[name])
    # torch numbers the weights of an optimizer in the order of its groups.
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    of = dict(zip(numbers, own, strict=True))
    moments = {
        number: {name: _moment(value, of[number]) for name, value in entry.items()}
        for number, entry in state["moments"].items()
    }
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _moment(value: Any, parameter: nn.Parameter) -> Any:
    """A value per element is sharded like its weight; one for all elements, such as the step count, is not."""
    alike = isinstance(value, torch.Tensor) and value.shape == local_part(parameter).shape and value.ndim > 0
    return as_part(value, parameter) if alike else value
