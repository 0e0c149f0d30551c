"""Reward functions that a recipe names, as module:function or path/to/file.py:function."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError, did_you_mean
from rlhf.reward.reward_functions import Completions, FunctionReward, Reward, weighted_sum


def named_rewards(names: Sequence[str]) -> list[Callable[..., Any]]:
    """The functions, in order; a UserError for one that is not there."""
    return [_named(name) for name in names]


def _named(name: str) -> Callable[..., Any]:
    module_name, colon, attribute = name.rpartition(":")
    if not colon or not module_name or not attribute:
        raise UserError(f"rewards: expected module:function or file.py:function, found {name!r}")
    try:
        module = _module(module_name)
    except UserError:
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"rewards: {module_name}: it cannot be imported: {why}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = "nothing of this name" if found is None else type(found).__name__
        raise UserError(
            f"rewards: {module_name}: expected a function {attribute!r}, found {what}{did_you_mean(attribute, known)}"
        )
    return found


def _module(name: str) -> ModuleType:
    """A module as Python finds it, then in the current folder; or a file."""
    if name.endswith(".py"):
        return _of_file(Path(name))
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # at the end: nothing of ours is hidden by a file there
    top = name.partition(".")[0]
    if top not in sys.modules and util.find_spec(top) is None:
        raise UserError(f"rewards: there is no module {top!r}, neither installed nor in {here}")
    return import_module(name)


def _of_file(path: Path) -> ModuleType:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise UserError(f"rewards: there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for files beside it
    spec = util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"rewards: {path}: expected a Python file")
    module = util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


class WeightedRewards:
    """Several rewards as one: their weighted sum, to which a function's None adds nothing."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None) -> None:
        self.rewards, self.weights = rewards, torch.tensor(weights or [1.0] * len(rewards))
        self.name = "rewards " + ", ".join(reward.name for reward in rewards)

    def __call__(self, completions: Completions) -> Tensor:
        """float32 [B], on the CPU."""
        scores = torch.stack([reward(completions).cpu() for reward in self.rewards], dim=1)
        return weighted_sum(scores, self.weights, torch.tensor([isinstance(r, FunctionReward) for r in self.rewards]))
