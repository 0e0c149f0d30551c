"""All stages of a run, one after another: python scripts/pipeline.py --recipe NAME --run NAME.

A stage that is done is skipped, one that was interrupted goes on.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.parsing import parse, recipe_folder, run_script
from rlhf.runtime.run_folder import is_done

ROOT = Path(__file__).resolve().parents[1]
# Stage -> the script that runs it; a recipe folder holds a STAGE.yaml for each it has.
STAGES = {
    "reward": "train_reward",
    "ppo_full": "train_ppo",
    "ppo_lora": "train_ppo",
    "evaluation": "evaluate",
}


@dataclass
class PipelineConfig:
    """What to run, and on what."""

    recipe: str = field(default="demo", metadata={"help": "a name in rlhf/recipes, or a folder of stage recipes"})
    engine: str | None = field(
        default=None,
        metadata={"help": "a name in accelerate_configs; not set: cpu, single_gpu or multi_gpu by what is there"},
    )


def main() -> None:
    run, config = parse([RunConfig, PipelineConfig])
    recipe = recipe_folder(config.recipe)
    engine = ROOT / "accelerate_configs" / f"{config.engine or _engine()}.yaml"
    if not engine.is_file():
        known = ", ".join(sorted(path.stem for path in engine.parent.glob("*.yaml")))
        raise UserError(f"engine: expected one of {known}, found {config.engine!r}")
    where = ["--run", run.run, "--runs_dir", run.runs_dir]
    stages = [stage for stage in STAGES if (recipe / f"{stage}.yaml").is_file()]
    for number, stage in enumerate(stages, start=1):
        if is_done(run.folder() / stage):
            print(f"[{number}/{len(stages)}] {stage}: done already", flush=True)
            continue
        print(f"[{number}/{len(stages)}] {stage}", flush=True)
        script = [str(ROOT / "scripts" / f"{STAGES[stage]}.py"), "--config", str(recipe / f"{stage}.yaml")]
        _run([*_launcher(engine), *script, *where], stage)
        if not is_done(run.folder() / stage):  # told to stop by a signal
            sys.exit(f"{stage}: not done yet; call the same command again to go on")
    _run([sys.executable, str(ROOT / "scripts" / "report.py"), *where], "report")


def _launcher(engine: Path) -> list[str]:
    if engine.stem == "cpu":
        # For one process on the CPU `accelerate launch` only sets this variable, and takes ten seconds to do so.
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return [sys.executable]
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(engine)]


def _run(command: list[str], stage: str) -> None:
    code = subprocess.run(command, check=False).returncode
    if code:
        print(
            f"error: stage {stage} ended with code {code}; mend it and call the same command again",
            file=sys.stderr,
        )
        sys.exit(code)


def _engine() -> str:
    devices = torch.cuda.device_count()
    return "cpu" if devices == 0 else "single_gpu" if devices == 1 else "multi_gpu"


if __name__ == "__main__":
    run_script(main)
