"""Type a prompt and read the answers of base, full and LoRA side by side, with scores: rlhf compare --run NAME.

Models and sampling settings are those of the run's evaluation. One prompt per line; an empty line or Ctrl+D ends.
--prompt TEXT answers one prompt and ends.
"""

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from io import TextIOWrapper
from itertools import zip_longest
from pathlib import Path

from rlhf.cli.parsing import parse
from rlhf.cli.script import run_script
from rlhf.config import CompareConfig, EvaluationConfig, RunConfig
from rlhf.console import quiet, screen
from rlhf.data.oasst import TextPrompt
from rlhf.distributed.collectives import join_processes
from rlhf.errors import UserError, printable
from rlhf.evaluation.generate import respond
from rlhf.file_types import ResponseRow
from rlhf.models.load import load_causal_lm, load_reward_model, load_tokenizer, stop_ids
from rlhf.storage.stages import POLICIES, read_run, require_stage

_GAP = 3  # columns between two responses


def side_by_side(rows: Sequence[ResponseRow], width: int) -> str:
    """The responses of several models as columns, their scores on top; `width` characters wide in all."""
    column = max(10, (width - _GAP * (len(rows) - 1)) // len(rows))
    cells = []
    for row in rows:
        ending = "" if row["eos"] else " (truncated)"
        title = f"{row['model']}  score {row['score']:+.2f}  {row['response_length']} tokens{ending}"
        lines = [
            line
            for part in printable(row["response"], keep="\n").split("\n")
            for line in textwrap.wrap(part, column) or [""]
        ]
        cells.append([*textwrap.wrap(printable(title), column), "-" * column, *lines])
    return "\n".join(
        (" " * _GAP).join(line.ljust(column) for line in lines).rstrip() for lines in zip_longest(*cells, fillvalue="")
    )


def _prompts(one: str | None) -> Iterator[str]:
    if one is not None:
        yield one
        return
    while True:
        try:
            text = input("prompt> ").strip()
        except EOFError:
            return
        if not text:
            return
        yield text


def _models(folder: Path, base: str) -> dict[str, str]:
    """name -> path of the models that the run has evaluated. base: as the recipe says it."""
    models = read_run(folder).get("model_paths")
    if not isinstance(models, dict) or "base" not in models:
        raise UserError(f"{folder / 'run.json'}: has no model_paths; run the evaluation again")
    trained = {name: str(require_stage(folder.parent / POLICIES[name])) for name in models if name in POLICIES}
    return {"base": _first_there(str(models["base"]), base)} | trained


def _first_there(*models: str) -> str:
    """The first of these paths that exists; the last one is taken in any case: it may be a name."""
    return next((model for model in models[:-1] if Path(model).exists()), models[-1])


def _judge(folder: Path, given: str | None) -> str:
    """The reward model: the one that was given for the evaluation, or the run's own."""
    if given is None:
        return str(require_stage(folder.parent / "reward"))
    paths = read_run(folder).get("judge_paths")
    return _first_there(str((paths if isinstance(paths, dict) else {}).get("reward")), given)


def main() -> None:
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal may know fewer characters
        sys.stdout.reconfigure(errors="replace")
    run, wanted = parse([RunConfig, CompareConfig])
    folder = require_stage(run.folder() / "evaluation")
    settings = read_run(folder).get("config")
    names = [field.name for field in fields(EvaluationConfig)]
    if not isinstance(settings, dict) or "base_model" not in settings:
        raise UserError(f"{folder / 'run.json'}: has no settings of an evaluation; run the evaluation again")
    config = EvaluationConfig(**{name: settings[name] for name in names if name in settings})
    if config.rewards:
        raise UserError(
            f"compare: run {run.run} was scored by functions ({', '.join(config.rewards)}), which read the columns of "
            "its data; a typed prompt has none"
        )
    device = join_processes(config.ddp_timeout).device
    models = _models(folder, config.base_model)
    with quiet.logged(run.folder() / "logs", "compare"), screen.busy("loading models"):
        tokenizer = load_tokenizer(models["base"])
        reward_model = load_reward_model(_judge(folder, config.reward_model_path)).to(device)
        policies = {name: load_causal_lm(path).to(device) for name, path in models.items()}
    for number, text in enumerate(_prompts(wanted.prompt)):
        prompt = TextPrompt(prompt_id=f"typed {number}", tree_id="", text=text)
        rows = [
            respond(name, model, tokenizer, reward_model, [prompt], config, stop_ids(model, tokenizer))[0]
            for name, model in policies.items()
        ]
        print(side_by_side(rows, shutil.get_terminal_size().columns), end="\n\n", flush=True)


if __name__ == "__main__":
    run_script(main)
