"""The stages of a recipe and their state in a run: python -m rlhf.cli.plan --recipe NAME --run NAME.

One line per stage, in the order in which they run:

    NAME STATE COMMAND SEED NEEDS CONFIG

STATE: done, running, stopped, failed or not_run; differs: what is asked for now is not what the stage was run with;
stale: what it read has changed since, or will. COMMAND: the stage's script is scripts/COMMAND.py. SEED: the stage's
seed with --seed N; - if the recipe's own seed counts. NEEDS: the stages that it waits for, joined by commas, or -.
CONFIG: the stage's file in the recipe, or -.

Slurm's job files read this. It starts in a fraction of a second: only where a recipe has changed does it import what
reads all settings.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from rlhf.errors import UserError, did_you_mean
from rlhf.file_types import Basis
from rlhf.storage.basis import Asked, differences, digest_of, has_nothing, refusal, report_holds, report_page
from rlhf.storage.stages import (
    REPORT,
    STAGES,
    StageSpec,
    basis,
    changed_stages,
    read_run,
    recipe_folder,
    stages_of,
    stages_read,
    status,
)


@dataclass(frozen=True)
class Planned:
    """A stage of a recipe, and how it stands in a run."""

    spec: StageSpec
    state: str  # as STATE above, with blanks
    flags: list[str]  # that it is run with
    differs: list[str]  # what is asked for now against what it was run with
    config: Path | None  # its recipe's file; the report has none

    def line(self) -> str:
        """The stage's line."""
        seed = self.flags[self.flags.index("--seed") + 1] if "--seed" in self.flags else "-"
        needs = ",".join(self.spec.needs) or "-"
        found = [self.spec.name, self.state.replace(" ", "_"), self.spec.command, seed, needs, str(self.config or "-")]
        return " ".join(found)


def planned(
    recipe: Path, folder: Path, seed: int | None = None, more: Sequence[str] = (), only: str | None = None
) -> list[Planned]:
    """All stages of a recipe in a run's folder, in order.

    seed: the run's; None if the recipe says it. more: flags of every stage. only: the one stage that will run with
    them: the settings of the others, which may not have such fields, are not compared.
    """
    found: dict[str, Planned] = {}
    for spec in stages_of(recipe):
        own = None if seed is None or spec.seed_offset is None else seed + spec.seed_offset
        one = _look(spec, recipe, folder, own, more if only in (None, spec.name) else None)
        again = [name for name in _read(spec, folder) if name in found and found[name].state != "done"]
        found[spec.name] = replace(one, state="stale") if again and one.state == "done" else one
    return list(found.values())


def _read(spec: StageSpec, folder: Path) -> list[str]:
    return [*STAGES] if spec.name == REPORT.name else [*stages_read(read_run(folder / spec.name))]


def _look(spec: StageSpec, recipe: Path, folder: Path, seed: int | None, more: Sequence[str] | None) -> Planned:
    """more: None if its settings are not to be compared."""
    if spec.name == REPORT.name:
        there = report_page(folder).is_file()
        return Planned(spec, "done" if report_holds(folder) else "stale" if there else "not run", [], [], None)
    config, flags = recipe / f"{spec.name}.yaml", [] if seed is None else ["--seed", str(seed)]
    facts = read_run(folder / spec.name)
    state, rest = status(facts), basis(facts)
    comparable = not has_nothing(folder / spec.name) and (rest or facts.get("config"))
    differs = []
    if comparable and more is not None:
        differs = differences(facts, _asked(spec, ["--config", str(config), *flags, *more], rest))
    if differs:
        state = "differs"
    elif changed_stages(folder / spec.name):
        state = "stale"
    return Planned(spec, state, flags, differs, config)


def _asked(spec: StageSpec, argv: Sequence[str], rest: Basis | None) -> Asked:
    """What the stage is asked for. The settings are read only if the recipe's file is not the one of then."""
    _, config, *flags = argv
    texts = [text for name, value in rest["flags"].items() for text in (f"--{name}", str(value))] if rest else []
    if rest and texts == flags and rest["recipe"] == digest_of(Path(config)):
        return Asked(rest["given"])
    commands, settings = import_module("rlhf.cli.__main__").COMMANDS.values(), import_module("rlhf.config")
    (names,) = (command.kinds for command in commands if command.module == spec.command)
    asked: Asked = import_module("rlhf.cli.parsing").read_asked([getattr(settings, name) for name in names], argv)
    return replace(asked, processes=None)


def refuse_differing(stages: Sequence[Planned]) -> None:
    """A UserError that names the stages whose settings differ, if there are any."""
    differing = [one for one in stages if one.differs]
    if differing:
        names = list(dict.fromkeys(one.spec.name for one in differing))  # of several runs, each once
        raise UserError(refusal(names, list(dict.fromkeys(text for one in differing for text in one.differs))))


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf.cli.plan", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--recipe", default="demo", help="a name in rlhf/recipes, or a folder of stage recipes")
    parser.add_argument("--run", default="default", help="name of the run")
    parser.add_argument("--runs_dir", default="runs", help="folder that holds all runs")
    parser.add_argument("--stage", help="only this stage")
    parser.add_argument("--seed", type=int, help="the run's seed, where it is one of several runs of a recipe")
    parser.add_argument("--check", action="store_true", help="an error if a stage was run with other settings")
    args = parser.parse_args()
    try:
        recipe = recipe_folder(args.recipe)
        names = [spec.name for spec in stages_of(recipe)]
        if args.stage not in (None, *names):
            meant = did_you_mean(args.stage, names)
            raise UserError(f"stage: recipe {args.recipe} has {', '.join(names)}, found {args.stage!r}{meant}")
        more = os.environ.get("RLHF_FLAGS", "").split()  # as slurm/node.sh splits it
        stages = planned(recipe, Path(args.runs_dir) / args.run, args.seed, more, args.stage)
        if args.check:
            refuse_differing(stages)
        lines = [one.line() for one in stages if args.stage in (None, one.spec.name)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
