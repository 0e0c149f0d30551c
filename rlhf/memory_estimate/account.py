"""How much memory a run needs per device.

Measured if that is cheap: parameters on models on the meta device, activations as what autograd saves in a forward
pass through one and two layers.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, TrainingArguments

from rlhf.distributed.devices import local_process_count, process_count
from rlhf.distributed.sharding import numel
from rlhf.errors import UserError
from rlhf.models.adapters import adapter_base
from rlhf.models.load import resolve_model
from rlhf.perf.hardware import total_memory

GB = 1e9

# Bytes of optimizer state for each byte of a trained fp32 parameter, by the optimizer's name; AdamW has 2.
_STATES = {"8bit": 0.5, "4bit": 0.25, "sgd": 0.0, "adafactor": 0.0, "lion": 1.0}


@dataclass(frozen=True)
class Part:
    """Something that takes memory, in bytes. weights, optimizer: always; the others: only in that phase."""

    name: str
    weights: float = 0.0
    optimizer: float = 0.0
    gradients: float = 0.0
    rollout: float = 0.0
    learning: float = 0.0
    saving: float = 0.0


@dataclass(frozen=True)
class Sharding:
    """ZeRO stage 0 to 3 (Rajbhandari et al. 2020): what is sharded over how many processes."""

    stage: int
    processes: int
    offload: bool = False  # optimizer states in main memory
    offload_weights: bool = False  # also weights, except during a rollout
    half: bool = False  # weights and gradients take 2 bytes, as in DeepSpeed under bf16 and fp16

    @classmethod
    def of(cls, args: TrainingArguments) -> "Sharding":
        """The sharding that the launcher has set up."""
        world = process_count()
        plugin: Any = args.deepspeed_plugin
        if plugin is None:
            return cls(0, world)
        devices = plugin.offload_optimizer_device, plugin.offload_param_device
        states, weights = (device not in (None, "none") and not args.use_cpu for device in devices)
        return cls(plugin.zero_stage, world, states, weights, half=bool(args.bf16 or args.fp16))

    def trained(self, name: str, model: torch.nn.Module, optim: str) -> Part:
        """A trained role: weights, gradients, optimizer states, and the engine's own copies."""
        parameters = list(model.parameters())
        weights = self._bytes(parameters)
        learned = [p for p in parameters if p.requires_grad]
        own = self._bytes(learned)
        states = (2 if self.half else 1) * own * next((size for key, size in _STATES.items() if key in optim), 2.0)
        share = [1 / self.processes if self.stage >= stage else 1.0 for stage in (1, 2)]
        if self.stage:  # a flat fp32 copy of what this process updates
            states += 4 * sum(numel(p) for p in learned)
        elif self.processes > 1:  # data parallelism copies gradients into buckets
            own *= 2
        optimizer = 0.0 if self.offload else states * share[0]
        held = self._held(weights)
        # ZeRO-3 gathers the weights for a rollout.
        return Part(name, held, optimizer, own * share[1], rollout=weights - held)

    def frozen(self, name: str, model: torch.nn.Module) -> Part:
        """A frozen role."""
        weights = self._bytes(list(model.parameters()))
        held = self._held(weights)
        return Part(name, held, rollout=weights - held)

    def _bytes(self, parameters: Sequence[torch.nn.Parameter]) -> float:
        return float(sum(numel(p) * min(p.element_size(), 2 if self.half else 8) for p in parameters))

    def _held(self, weights: float) -> float:
        if self.stage < 3:
            return weights
        return 0.0 if self.offload_weights else weights / self.processes


def read_config(name: str, **options: Any) -> PretrainedConfig:
    """A model's configuration, an adapter's base's; a UserError if there is none, or if a folder has no weights."""
    path = resolve_model(name)
    base = adapter_base(path, options.get("revision"))
    if base is not None:
        return read_config(base, **options | {"revision": "main"})
    options.setdefault("trust_remote_code", False)  # if not set, transformers asks on the terminal
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {name!r}: expected a model that transformers can load, found: {reason}") from error
    if Path(path).is_dir() and not list(Path(path).glob("*.safetensors")):
        raise UserError(f"model {name!r}: expected weights as .safetensors, found none in {path}")
    return config


def reward_config(name: str, **options: Any) -> PretrainedConfig:
    """A reward model's configuration; a UserError if it is another kind of model or has several labels."""
    if adapter_base(resolve_model(name), options.get("revision")) is not None:
        return read_config(name, num_labels=1, **options)  # the head is in the adapter
    config = read_config(name, **options)
    kinds = config.architectures or []
    if kinds and not any("ForSequenceClassification" in kind for kind in kinds):
        raise UserError(f"reward model {name!r}: expected a trained head with 1 label, found a {kinds[0]}")
    if config.num_labels != 1:
        raise UserError(f"reward model {name!r}: expected a trained head with 1 label, found {config.num_labels}")
    return config


def shallow(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with fewer layers."""
    config = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.num_hidden_layers = layers
    return config


def kept_bytes(forward: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes that autograd saves in a forward pass for the backward pass, without parameters."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # otherwise its address could be reused
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in kept.items() if place not in own)


def by_rows(measure: Callable[[int], int], rows: int) -> int:
    """Extrapolate measure(1) and measure(2) rows linearly: under autocast a pass keeps weights, too, once for all."""
    one = measure(1)
    return one if rows == 1 else one + (measure(2) - one) * (rows - 1)


def by_depth(measure: Callable[[int], int], layers: int) -> float:
    """Extrapolate measure(1) and measure(2) layers linearly to all layers."""
    one, two = measure(1), measure(2)
    return one + (two - one) * (layers - 1)


def peak(parts: Sequence[Part], base: float, keeps_freed: bool) -> float:
    """Peak bytes: base, what is always there, and the largest phase.

    keeps_freed: the allocator still holds the memory of the rollout or update while the policy is saved. What it holds
    is in pieces: of the smaller of the two phases about half cannot be used by the other (measured on the demo, over
    ten steps whose texts have other lengths each).
    """
    always = sum(part.weights + part.optimizer for part in parts)
    rollout = sum(part.rollout for part in parts)
    learning = sum(part.gradients + part.learning for part in parts)
    saving = sum(part.saving for part in parts)
    if keeps_freed:
        return base + always + max(rollout, learning) + min(rollout, learning) / 2 + saving
    return base + always + max(rollout, learning, saving)


def base_bytes(use_cpu: bool) -> float:
    """Bytes of a process without models: on a CPU its current size, on a GPU about the size of CUDA's context."""
    if not use_cpu:
        return 0.5 * GB
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0.5 * GB)


def device_bytes(use_cpu: bool) -> float:
    """Bytes available to this process: its accelerator's memory, or its share of the machine's."""
    device = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    if device is not None and (found := total_memory(device)) is not None:
        return found
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / local_process_count()


def table(parts: Sequence[Part], base: float) -> list[str]:
    """The parts as lines of a table, in GB."""
    columns = ("weights", "optimizer", "gradients", "rollout", "learning", "saving")
    lines = ["GB per device".ljust(22) + "".join(name.rjust(11) for name in columns)]
    for part in parts:
        lines.append(part.name.ljust(22) + "".join(f"{getattr(part, name) / GB:11.2f}" for name in columns))
    return [*lines, "the process itself".ljust(22) + f"{base / GB:11.2f}"]


def check_writable(folder: Path) -> None:
    """A UserError if the folder cannot be created or written to."""
    there = folder
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output folder {folder}: cannot write to {there}; choose another folder")


def verdict(parts: Sequence[Part], base: float, use_cpu: bool, say: Callable[[str], None] = print) -> None:
    """Print the table and the peak; a UserError if the device has less memory."""
    say("\n".join(table(parts, base)))
    # environment.sh sets it, so that glibc keeps freed memory: fresh memory is slow.
    keeps_freed = use_cpu and "MALLOC_TRIM_THRESHOLD_" in os.environ
    need, have = peak(parts, base, keeps_freed), device_bytes(use_cpu)
    say(f"peak: {need / GB:.2f} GB of {have / GB:.1f} GB per device")
    if need > have:
        raise UserError(
            f"memory: the run needs {need / GB:.1f} GB per device, but {have / GB:.1f} GB are available; "
            "the table above shows what takes them"
        )
