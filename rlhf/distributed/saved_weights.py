"""The weights of a PPO checkpoint as one process has them, whichever engine wrote it."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf.distributed.trained_weights import check_loaded

WEIGHTS, SHARDS = "model.safetensors", "shard-*.pt"


def saved_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Name -> trained weight, in main memory. The pickles in the folder must have been checked."""
    if (checkpoint / WEIGHTS).is_file():
        return load_file(checkpoint / WEIGHTS)
    if shards := sorted(checkpoint.glob(SHARDS), key=lambda path: int(path.stem.rpartition("-")[2])):
        parts = [torch.load(path, map_location="cpu", weights_only=True)["weights"] for path in shards]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}  # FSDP2 shards by rows
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # importing it takes seconds

    found = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), exclude_frozen_parameters=True)
    return dict(found)


def load_part(model: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    """Load what is saved of one part of the whole into it. A RuntimeError if it is of another model.

    prefix: the part's name in the whole. A tied weight may be saved under one of its names.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    loaded = model.load_state_dict(state, strict=False)
    found = {id(own[name]) for name in state if name in own}
    check_loaded(model, [name for name in own if id(own[name]) not in found], loaded.unexpected_keys)
