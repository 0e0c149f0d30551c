"""What `torch.cuda` and `torch.accelerator` answer about a device that is not there, and what is made on it."""

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

_BYTES = 80 * 2**30
_PROPERTIES = SimpleNamespace(
    major=9, minor=0, total_memory=_BYTES, name="Pretend H100", multi_processor_count=132, is_integrated=False
)


def device() -> torch.device:
    """The device of this process: one each, by its local rank."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))


def _count() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def patches(waited: Callable[[str], None], arrived: Callable[[], None]) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, in its place). waited(what): the host waits; arrived(): it knows that all is done."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def synchronize(*_: Any, **__: Any) -> None:
        waited("synchronize")

    def answers(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    class Event:
        """Not over when first asked, over when asked again."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.asked = False

        def query(self) -> bool:
            over, self.asked = self.asked, True
            if over:
                arrived()
            return over

        def synchronize(self) -> None:
            waited("synchronize")

        record = wait = nothing
        elapsed_time = answers(1.0)

    class Stream:
        """There is one; work is done in order."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.device = device()

        query, is_capturing = answers(True), answers(False)
        wait_stream = wait_event = nothing

        def synchronize(self) -> None:
            waited("synchronize")

        def record_event(self, event: Any = None) -> Any:
            return event or Event()

        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *_: Any) -> None:
            return None

    load = torch.load

    def load_onto(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
        to = map_location if isinstance(map_location, str | torch.device) else None
        if to is None or torch.device(to).type != "cuda":
            return load(*args, map_location=map_location, **kwargs)
        found = load(*args, map_location="cpu", **kwargs)
        return torch.utils._pytree.tree_map(lambda x: x.to(to) if isinstance(x, torch.Tensor) else x, found)

    cuda = {
        "is_available": answers(True),
        "is_initialized": answers(True),
        "_lazy_init": nothing,
        "device_count": lambda: _count(),
        "current_device": lambda: device().index,
        "set_device": nothing,
        "_exchange_device": lambda index: device().index,
        "_maybe_exchange_device": lambda index: device().index,
        "get_device_properties": answers(_PROPERTIES),
        "get_device_name": answers(_PROPERTIES.name),
        "get_device_capability": answers((9, 0)),
        "is_bf16_supported": answers(True),
        "empty_cache": nothing,
        "mem_get_info": answers((_BYTES, _BYTES)),
        "memory_allocated": answers(0),
        "memory_reserved": answers(0),
        "max_memory_allocated": answers(0),
        "max_memory_reserved": answers(0),
        "reset_peak_memory_stats": nothing,
        "manual_seed": nothing,  # what is drawn comes from the CPU's generator
        "manual_seed_all": nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state() for _ in range(_count())],
        "set_rng_state": nothing,
        "set_rng_state_all": nothing,
        "synchronize": synchronize,
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "default_stream": Stream,
        "stream": lambda stream: stream,
    }
    accelerator = {
        "is_available": answers(True),
        "current_accelerator": answers(torch.device("cuda")),
        "device_count": lambda: _count(),
        "current_device_index": lambda: device().index,
        "set_device_index": nothing,
        "current_stream": Stream,
        "synchronize": synchronize,
        "empty_cache": nothing,
        "memory_allocated": answers(0),
        "memory_reserved": answers(0),
        "max_memory_allocated": answers(0),
        "max_memory_reserved": answers(0),
        "reset_peak_memory_stats": nothing,
        "get_memory_info": answers((_BYTES, _BYTES)),
    }
    for owner, table in ((torch.cuda, cuda), (torch.cuda.random, cuda), (torch.accelerator, accelerator)):
        yield from ((owner, name, new) for name, new in table.items() if hasattr(owner, name))
    yield from ((torch, "Event", Event), (torch, "load", load_onto))
