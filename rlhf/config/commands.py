"""The settings of commands that are no stage: pipeline, prepare, compare, export, benchmark and gpu-check.

It imports neither torch nor transformers, so that the help of a command is quick.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.config.fields import check_seeds, help_text
from rlhf.errors import UserError

_MOST_SEEDS = 1000


@dataclass
class PipelineConfig:
    """What to run, and on what."""

    recipe: str = help_text("a name in rlhf/recipes, or a folder of stage recipes", "demo")
    engine: str | None = help_text(
        "a name in accelerate_configs; default: cpu, single_gpu or multi_gpu, by the devices"
    )
    num_processes: int | None = help_text(
        "processes on this machine (slurm: per node); default: one per device, 2 for multi_cpu"
    )
    executor: Literal["local", "slurm"] = help_text("run here, or submit to Slurm", "local")
    seed: int | None = help_text("seed of all stages but the evaluation; default: as the recipe says")
    seeds: str | None = help_text(
        "one run per seed, RUN-seed1 and so on, e.g. 1,2,3 or 1-3, and a report on all; default: one run"
    )
    redo: bool = help_text("run stages again from their start that were run with other settings", False)
    sbatch: str = help_text("slurm: sbatch options for every stage, e.g. --sbatch='--nodes=2'", "")

    def __post_init__(self) -> None:
        if self.num_processes is not None and self.num_processes < 1:
            raise UserError(f"num_processes: expected at least 1, found {self.num_processes}")
        if self.executor == "local" and self.sbatch:
            raise UserError("sbatch: add --executor slurm; it has no meaning for a local run")
        if self.seed is not None and self.seeds is not None:
            raise UserError("seed, seeds: give one of them, not both")
        if self.executor == "slurm" and self.seed is not None:
            raise UserError(f"seed: with --executor slurm use --seeds {self.seed}")
        check_seeds(self, "seed")
        if self.executor == "local":
            self.seed_list()

    def seed_list(self) -> list[int]:
        """The seeds of a local run, one run each."""
        found: list[int] = []
        if self.seeds is None:
            return found
        for part in self.seeds.split(","):
            first, dash, last = part.strip().partition("-")
            ends = [first, last if dash else first]
            if not all(end.isdecimal() and len(end) < 10 for end in ends) or int(ends[0]) > int(ends[1]):
                raise UserError(f"seeds: expected numbers like 1,2,3 or 1-3, found {self.seeds[:80]!r}")
            found += range(int(ends[0]), int(ends[1]) + 1)
            if len(found) > _MOST_SEEDS or len(set(found)) < len(found):
                raise UserError(f"seeds: expected different seeds, at most {_MOST_SEEDS}, found {self.seeds[:80]!r}")
        return found


@dataclass
class PrepareConfig:
    """What to download."""

    recipe: str = help_text("a name in rlhf/recipes, or a folder of stage recipes", "demo")
    engine: str | None = help_text(
        "zero3_offload: also compile DeepSpeed's CPU Adam, on the kind of CPU that trains; default: nothing to compile"
    )


@dataclass
class CompareConfig:
    """What to answer."""

    prompt: str | None = help_text("answer this prompt and end; default: read prompts from the terminal")


@dataclass
class ExportConfig:
    """Which checkpoint, and where its model goes."""

    stage: Literal["ppo_full", "ppo_lora"] = help_text("stage that wrote the checkpoint", "ppo_full")
    checkpoint: str | None = help_text(
        "its name in the stage's checkpoints, such as step-20, or its path; default: the newest"
    )
    output: str | None = help_text("new folder for the model; default: none, it must be given")
    trust_remote_code: bool = help_text("run code that comes with the base model", False)


@dataclass
class BenchmarkConfig:
    """What to compare."""

    work: Literal["ppo_full", "ppo_lora", "reward", "evaluation"] = help_text(
        "work to time; the last two are compared with plain loops", "ppo_full"
    )
    shape: Literal["seed", "tiny", "smollm2", "smollm2-16", "gpt2-medium"] | None = help_text(
        "size of the work; default: seed, or gpt2-medium with predict; growth takes seed (some minutes) or tiny (fewer)"
    )
    precision: Literal["default", "fp32", "bf16"] = help_text("default: each side's own default", "fp32")
    pairs: int = help_text("runs of each side, in turn", 3)
    steps: int = help_text("steps per run; the first is not counted", 2)
    trl: str | None = help_text("folder with TRL 1.12, needed for PPO; default: none")
    quick: bool = help_text(
        "instead: count what steps of shape tiny compute; an error if a count has grown by 5 % (half a minute)", False
    )
    growth: bool = help_text("instead: this trainer's time and memory as the work grows", False)
    predict: str | None = help_text(
        "instead: predict a step's time on a GPU: h100, h200, a100, or a JSON file of one's figures; default: no"
    )
    peak_tflops: float | None = help_text("of that GPU: TFLOP/s of dense bf16 matrix products; default: as published")
    bandwidth_gbs: float | None = help_text("of that GPU: memory bandwidth in GB/s; default: as published")
    share: float | None = help_text("of that GPU: share of the peak that passes reach, 0 to 1; default: an assumed one")
    launch_us: float | None = help_text(
        "of that GPU and its host: microseconds per kernel launch; default: an assumed one"
    )
    wait_us: float | None = help_text(
        "of that GPU and its host: microseconds per synchronisation; default: an assumed one"
    )
    captured: bool | None = help_text("predict decoding with a CUDA graph; default: as this version does")
    output: str | None = help_text("write the figures to this file as JSON; default: print them")

    def __post_init__(self) -> None:
        if self.shape is None:
            self.shape = "seed" if self.predict is None else "gpt2-medium"
        if self.growth and self.shape not in ("seed", "tiny"):
            raise UserError(f"shape: expected seed or tiny with growth, found {self.shape!r}")
        if self.pairs < 1 or self.steps < 2:
            raise UserError(f"pairs, steps: expected at least 1 and 2, found {self.pairs} and {self.steps}")
        there = self.trl and (Path(self.trl) / "trl" / "experimental" / "ppo").is_dir()
        if self.work.startswith("ppo") and not there and not (self.growth or self.quick) and self.predict is None:
            raise UserError(
                "trl: expected a folder made by `pip install --no-deps --target DIR trl==1.12.0`, "
                f"found {self.trl or 'none'}"
            )


@dataclass
class GpuCheckConfig:
    """What to check, and for how long."""

    device: Literal["cuda", "cpu"] = help_text("cpu: only to test the check itself", "cuda")
    quick: bool = help_text("tiny shapes, one pair of runs: one or two minutes on two cores", False)
    minutes: float = help_text("minutes for all items; those not started by then are left out", 10.0)
    slower: float = help_text("a step is reported as slow if it takes more than this many times its ideal time", 3.0)
    trl: str | None = help_text(
        "folder made by `pip install --no-deps --target DIR trl==1.12.0`, to compare with; default: none"
    )
    only: str | None = help_text("only items whose name contains this text; default: all")
    output: str = help_text("folder for gpu_check.json and gpu_check.md", "runs/gpu_check")

    def __post_init__(self) -> None:
        for name in ("minutes", "slower"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: expected a positive number, found {getattr(self, name)}")
        if self.trl is not None and not (Path(self.trl) / "trl" / "experimental" / "ppo").is_dir():
            raise UserError(f"trl: expected a folder with TRL 1.12, found {self.trl}")
