"""What a pipeline can know before it starts: mistakes in its recipes, the precision and the expected time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.cli import evaluate, train_ppo, train_reward
from rlhf.cli.expected_time import expected_time
from rlhf.cli.parsing import parse
from rlhf.config.precision import precision, precision_line
from rlhf.storage.stages import StageSpec, stages_of

# Command of a stage -> its settings, and which of its stages they are of.
_KINDS: dict[str, tuple[list[Any], Any]] = {
    "train_reward": (train_reward.KINDS, train_reward.stage_name),
    "train_ppo": (train_ppo.KINDS, train_ppo.stage_name),
    "evaluate": (evaluate.KINDS, None),
}


def foresee(recipe: Path, stages: Sequence[StageSpec], where: Sequence[str]) -> tuple[list[str], str]:
    """Threads and precision, and the expected time, in words. A UserError for a mistake in any of these recipes.

    It measures, which starts PyTorch's threads: call it in a process that will not fork.
    """
    lines, found = [], []
    for stage in stages:
        kinds, name = _KINDS[stage.command]
        settings = parse(kinds, ["--config", str(recipe / f"{stage.name}.yaml"), *where], name)
        found.append(settings)
        if name is not None:
            lines.append(precision_line(settings[-1]) or precision(settings[-1])["taken"])
    threads = torch.get_num_threads()
    on = [f"{threads} CPU thread{'s' if threads > 1 else ''}", *dict.fromkeys(lines)]
    return on, expected_time(found, [stage.name for stage in stages_of(recipe)])
