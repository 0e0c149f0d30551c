"""The weights of a model that are trained. The others stay as loaded, and no checkpoint holds them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from rlhf.distributed.sharding import gathered

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The last digits of a norm, or of weights with a merged adapter, may differ between machines.
_TOLERANCE = 1e-5


def trained_names(model: torch.nn.Module) -> set[str]:
    """Names in state_dict() of all trained parameters and all buffers; tied ones under each of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return {name for name, p in parameters if p.requires_grad} | {name for name, _ in buffers}


@contextmanager
def without_frozen_weights(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, model.state_dict() leaves out weights that are never trained, also below a wrapper."""
    if all(p.requires_grad for p in model.parameters()):
        yield
        return
    kept = trained_names(model)

    def leave_out(_: torch.nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in kept]:
            del state[name]

    handle = model.register_state_dict_post_hook(leave_out)
    try:
        yield
    finally:
        handle.remove()


def check_loaded(model: torch.nn.Module, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """A RuntimeError if a loaded state lacked trained weights or had unknown ones.

    missing, unexpected: as load_state_dict returns them. Frozen weights may be missing.
    """
    lacking, unknown = sorted(set(missing) & trained_names(model)), sorted(unexpected)
    if lacking or unknown:
        found = [("no", lacking), ("unknown", unknown)]
        raise RuntimeError("; ".join(f"{what} {', '.join(names[:3])}" for what, names in found if names))


def load_trained(src: Mapping[str, Any], dst: torch.nn.Module) -> None:
    """Load a state in which frozen weights may be missing. The argument names are DeepSpeed's."""
    loaded = dst.load_state_dict(src, strict=False)
    check_loaded(dst, loaded.missing_keys, loaded.unexpected_keys)


def frozen_norms(model: torch.nn.Module) -> dict[str, float]:
    """Name -> norm of each weight that is never trained. A resumed run must have the same norms.

    Quantised codes are left out, because they depend on the machine.
    """
    with gathered([model]), torch.no_grad():
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad and p.dtype in _FLOATS}
        if not frozen:
            return {}
        norms = [
            torch.linalg.vector_norm(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in frozen.values()
        ]
        return dict(zip(frozen, torch.stack([norm.float() for norm in norms]).tolist(), strict=True))


def same_norms(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether both are norms of the same weights."""
    return one.keys() == other.keys() and all(
        math.isclose(norm, other[name], rel_tol=_TOLERANCE, abs_tol=1e-9) for name, norm in one.items()
    )
