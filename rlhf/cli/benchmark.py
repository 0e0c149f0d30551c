"""Time this trainer against TRL 1.12's on the same work, A B A B: rlhf benchmark --shape seed --trl DIR.

DIR holds the last TRL release with a PPOTrainer: pip install --no-deps --target DIR trl==1.12.0
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.benchmark.compare import compare, table
from rlhf.benchmark.growth import growth, growth_table
from rlhf.benchmark.predict import GPUS, gpu_of, predict, prediction_table
from rlhf.benchmark.work import SHAPES, WORKS
from rlhf.cli.parsing import parse
from rlhf.cli.script import run_script
from rlhf.config.common import help_text
from rlhf.errors import UserError
from rlhf.storage.run_folder import write_json


@dataclass
class BenchmarkConfig:
    """What to compare."""

    shape: str | None = help_text(f"size of the work: {', '.join(SHAPES)}; default seed, gpt2-medium to predict")
    work: str = help_text(f"work to time: {', '.join(WORKS)}; the last two are compared with plain loops", "ppo_full")
    precision: Literal["default", "fp32", "bf16"] = help_text("default: each side's own default", "fp32")
    pairs: int = help_text("runs of each side, in turn", 3)
    steps: int = help_text("steps per run; the first is not counted", 2)
    trl: str | None = help_text("folder with TRL 1.12, for PPO")
    growth: bool = help_text("instead: this trainer's time and memory as the work grows", False)
    predict: str | None = help_text(
        f"instead: predict a step's time on a GPU ({', '.join(GPUS)}, or a JSON file with these fields)"
    )
    peak_tflops: float | None = help_text("of that GPU: TFLOP/s of dense bf16 matrix products")
    bandwidth_gbs: float | None = help_text("of that GPU: memory bandwidth in GB/s")
    share: float | None = help_text("of that GPU: share of the peak that forward and backward passes reach")
    launch_us: float | None = help_text("of that GPU and its host: microseconds per kernel launch")
    wait_us: float | None = help_text("of that GPU and its host: microseconds per synchronisation")
    captured: bool | None = help_text("predict decoding with a CUDA graph; default: as this version does")
    output: str | None = help_text("write the figures to this file as JSON")

    def __post_init__(self) -> None:
        if self.shape is None:
            self.shape = "seed" if self.predict is None else "gpt2-medium"
        for name, known in (("shape", tuple(SHAPES)), ("work", WORKS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}: expected one of {', '.join(known)}, found {getattr(self, name)!r}")
        if self.pairs < 1 or self.steps < 2:
            raise UserError(f"pairs, steps: expected at least 1 and 2, found {self.pairs} and {self.steps}")
        there = self.trl and (Path(self.trl) / "trl" / "experimental" / "ppo").is_dir()
        if self.work.startswith("ppo") and not there and not self.growth and self.predict is None:
            raise UserError(
                "trl: expected a folder made by `pip install --no-deps --target DIR trl==1.12.0`, "
                f"found {self.trl or 'none'}"
            )


def main() -> None:
    (config,) = parse([BenchmarkConfig])
    if config.predict is not None:
        shape = SHAPES[config.shape or "gpt2-medium"]
        changes = {x: getattr(config, x) for x in ("peak_tflops", "bandwidth_gbs", "share", "launch_us", "wait_us")}
        prediction = predict(shape, gpu_of(config.predict, **changes), config.captured)
        print(prediction_table(prediction, shape, config.predict))
        if config.output:
            write_json(Path(config.output), prediction)
        return
    if config.growth:
        series = growth(config.precision)
        print(growth_table(series))
        if config.output:
            write_json(Path(config.output), {"growth": series})
        return
    given = {name: getattr(config, name) for name in ("shape", "work", "precision", "steps")}
    found = compare(given, config.pairs, Path(config.trl).resolve() if config.trl else None)
    print(table(found))
    if config.output:
        write_json(Path(config.output), found)
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    run_script(main)
