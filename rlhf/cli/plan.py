"""The stages of a recipe and their state in a run: python -m rlhf.cli.plan --recipe NAME --run NAME.

One line per stage, in the order in which they run:

    NAME STATE COMMAND SEED NEEDS CONFIG

STATE: done, running, stopped, failed or not_run. COMMAND: the stage's script is scripts/COMMAND.py. SEED: the stage's
seed with --seed N; - if the recipe's own seed counts. NEEDS: the stages that it waits for, joined by commas, or -.
CONFIG: the stage's file in the recipe, or -.

Slurm's job files read this. It starts in a fraction of a second, as it imports no torch.
"""

import argparse
import sys
from pathlib import Path

from rlhf.errors import UserError, did_you_mean
from rlhf.storage.stages import REPORT, StageSpec, read_run, recipe_folder, stages_of, status


def line(spec: StageSpec, recipe: Path, folder: Path, seed: int | None) -> str:
    """A stage's line. folder: of the run; seed: the run's, None if the recipe says it."""
    state, config = "not run", "-"
    if spec.name != REPORT.name:
        state, config = status(read_run(folder / spec.name)), str(recipe / f"{spec.name}.yaml")
    own = "-" if seed is None or spec.seed_offset is None else str(seed + spec.seed_offset)
    return " ".join([spec.name, state.replace(" ", "_"), spec.command, own, ",".join(spec.needs) or "-", config])


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf.cli.plan", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--recipe", default="demo", help="a name in rlhf/recipes, or a folder of stage recipes")
    parser.add_argument("--run", default="default", help="name of the run")
    parser.add_argument("--runs_dir", default="runs", help="folder that holds all runs")
    parser.add_argument("--stage", help="only this stage")
    parser.add_argument("--seed", type=int, help="the run's seed, where it is one of several runs of a recipe")
    args = parser.parse_args()
    try:
        recipe = recipe_folder(args.recipe)
        specs = stages_of(recipe)
        if args.stage is not None:
            known, specs = specs, [spec for spec in specs if spec.name == args.stage]
            if not specs:
                names = [spec.name for spec in known]
                meant = did_you_mean(args.stage, names)
                raise UserError(f"stage: recipe {args.recipe} has {', '.join(names)}, found {args.stage!r}{meant}")
        lines = [line(spec, recipe, Path(args.runs_dir) / args.run, args.seed) for spec in specs]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
