"""The stages of a run: their order, what each one needs, and whether one is done. No other place says so.

Slurm's job files ask it through `python -m rlhf.cli.plan`, so it imports neither torch nor anything that does.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from rlhf.errors import UserError, did_you_mean
from rlhf.file_types import Basis, RunFile
from rlhf.storage.disk import read_json

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True)
class StageSpec:
    """One stage. It reads RECIPE/NAME.yaml and writes to RUNS_DIR/RUN/NAME."""

    name: str
    title: str  # for readers
    command: str  # rlhf.cli.COMMAND runs it, and so does scripts/COMMAND.py
    needs: tuple[str, ...] = ()  # stages that must be done before it starts
    seed_offset: int | None = 0  # with --seeds N it runs with seed N + seed_offset; None: with the recipe's own seed


_SPECS = (
    StageSpec("reward", "Reward model", "train_reward"),
    # Its seed differs from the first reward model's.
    StageSpec("reward_gold", "Second reward model", "train_reward", seed_offset=1000),
    StageSpec("ppo_full", "PPO, full", "train_ppo", ("reward",)),
    StageSpec("ppo_lora", "PPO, LoRA", "train_ppo", ("reward",)),
    # All runs are evaluated with the same random numbers.
    StageSpec("evaluation", "Evaluation", "evaluate", ("reward_gold", "ppo_full", "ppo_lora"), seed_offset=None),
)

STAGES = {spec.name: spec for spec in _SPECS}  # in the order in which they run

TITLES = {spec.name: spec.title for spec in _SPECS}

REPORT = StageSpec("report", "Report", "report", seed_offset=None)  # no recipe; made of the files of the others

ANSWERED = "answered.jsonl"  # an evaluation's responses so far; what it resumes from

# The policy's name in evaluation and report -> the stage that trains it.
POLICIES = {"full": "ppo_full", "lora": "ppo_lora"}


def stages_of(recipe: Path) -> list[StageSpec]:
    """The stages that a recipe folder has a file for, in order, then the report; `needs` holds no others."""
    found = [spec for name, spec in STAGES.items() if (recipe / f"{name}.yaml").is_file()]
    names = {spec.name for spec in found}
    found = [replace(spec, needs=tuple(name for name in spec.needs if name in names)) for spec in found]
    needed = {name for spec in found for name in spec.needs}
    return [*found, replace(REPORT, needs=tuple(spec.name for spec in found if spec.name not in needed))]


def recipe_folder(name: str) -> Path:
    """The folder of a recipe, which is a name in rlhf/recipes or a path. A UserError if it holds no stage's file."""
    for folder in (RECIPES / name, Path(name)):
        try:
            if any((folder / f"{stage}.yaml").is_file() for stage in STAGES):
                return folder
        except (OSError, ValueError):  # too long a name, or a null byte
            continue
    known = sorted(path.name for path in RECIPES.iterdir() if path.is_dir())
    files = f"{'.yaml, '.join(STAGES)}.yaml"
    meant = did_you_mean(name, known)
    raise UserError(f"recipe: expected one of {', '.join(known)}, or a folder with {files}, found {name!r}{meant}")


def read_run(stage_folder: Path) -> RunFile:
    """A stage's run.json, or {} if the stage never started."""
    return cast(RunFile, read_json(stage_folder / "run.json"))


def status(facts: RunFile) -> str:
    """What a run.json says of its stage: running, done, stopped or failed; "not run" if there is none."""
    found = str(facts.get("status", "not run"))
    return "not run" if found == "clearing" else found


def says_done(facts: RunFile) -> bool:
    """Whether a run.json says that its stage ran to its end."""
    return status(facts) == "done"


def is_done(stage_folder: Path) -> bool:
    """Whether the stage ran to its end."""
    return says_done(read_run(stage_folder))


def basis(facts: RunFile) -> Basis | None:
    """What the stage's results rest on; None for an earlier version's run.json, or a broken one."""
    found = facts.get("basis")
    parts = [found.get(name) for name in ("given", "flags", "data", "stages")] if isinstance(found, dict) else []
    return found if parts and all(isinstance(part, dict) for part in parts) else None


def stages_read(facts: RunFile) -> dict[str, str]:
    """Earlier stage that the stage has read -> its id; an evaluation of an earlier version has that of the policies."""
    if found := basis(facts):
        return found["stages"]
    ids = facts.get("model_ids")
    ids = ids if isinstance(ids, dict) else {}
    return {POLICIES[name]: own for name, own in ids.items() if own and name in POLICIES}


def stage_ids(run: Path, *names: str) -> dict[str, str]:
    """Stage -> the id of its start, for those that have one."""
    return {name: own for name in names if (own := read_run(run / name).get("id"))}


def changed_stages(stage_folder: Path) -> list[str]:
    """Earlier stages that have been run again since the stage read them, and those that an evaluation lacks."""
    facts, run = read_run(stage_folder), stage_folder.parent
    read = stages_read(facts)
    changed = [name for name, own in read.items() if read_run(run / name).get("id") != own]
    if stage_folder.name == "evaluation" and basis(facts):
        changed += [name for name in STAGES["evaluation"].needs if name not in read and is_done(run / name)]
    return changed


def stale_stages(run: Path) -> dict[str, list[str]]:
    """Stage whose results are of other runs of the stages that it read, or of stale ones -> those stages."""
    found: dict[str, list[str]] = {}
    for name in STAGES:
        changed = changed_stages(run / name)
        changed += [one for one in stages_read(read_run(run / name)) if one in found and one not in changed]
        if changed:
            found[name] = changed
    return found


def stale_lines(run: Path) -> list[str]:
    """A line on each stale stage, for readers."""
    return [
        f"{run.name}: {name} is stale, since {' and '.join(changed)} changed: run that stage again"
        for name, changed in stale_stages(run).items()
    ]


def require_stage(stage_folder: Path) -> Path:
    """The folder of a stage that is done. Otherwise a UserError that says which stage to run first.

    Its results must be of the stages that its run has now.
    """
    facts = read_run(stage_folder)
    if not says_done(facts):
        raise UserError(
            f"{stage_folder}: expected a stage that is done, found: {status(facts)}; run that stage first"
            f"{meant_run(stage_folder.parent)}"
        )
    if changed := stale_stages(stage_folder.parent).get(stage_folder.name):
        raise UserError(f"{stage_folder}: stale, since {' and '.join(changed)} changed; run that stage again")
    return stage_folder


def meant_run(folder: Path) -> str:
    """The end of an error line on a run that is not there: the run beside it with the most similar name, if any is."""
    if folder.is_dir() or not folder.parent.is_dir():
        return ""
    runs = [path.name for path in folder.parent.iterdir() if any((path / stage).is_dir() for stage in STAGES)]
    return did_you_mean(folder.name, sorted(runs))
