"""Time this trainer against TRL 1.12's on the same work, A B A B: rlhf benchmark --shape seed --trl DIR.

DIR holds the last TRL release with a PPOTrainer: pip install --no-deps --target DIR trl==1.12.0
"""

import json
from pathlib import Path

from rlhf.benchmark.compare import all_counts, compare, table
from rlhf.benchmark.counts import check_growth, counts_table
from rlhf.benchmark.growth import growth, growth_table
from rlhf.benchmark.predict import gpu_of, predict, prediction_table
from rlhf.benchmark.work import SHAPES
from rlhf.cli.parsing import parse
from rlhf.cli.script import run_script
from rlhf.config import BenchmarkConfig
from rlhf.console import screen
from rlhf.storage.run_folder import write_json


def main() -> None:
    (config,) = parse([BenchmarkConfig])
    if config.predict is not None:
        shape = SHAPES[config.shape or "gpt2-medium"]
        changes = {x: getattr(config, x) for x in ("peak_tflops", "bandwidth_gbs", "share", "launch_us", "wait_us")}
        prediction = predict(shape, gpu_of(config.predict, **changes), config.captured)
        screen.to_copy(prediction_table(prediction, shape, config.predict))
        if config.output:
            write_json(Path(config.output), prediction)
        return
    if config.quick:
        found = all_counts()
        screen.to_copy(counts_table(found))
        if config.output:
            write_json(Path(config.output), found)
        else:
            check_growth(found)
        return
    if config.growth:
        series = growth(config.shape or "seed", config.precision, screen.say)
        screen.to_copy(growth_table(series))
        if config.output:
            write_json(Path(config.output), {"growth": series})
        return
    given = {name: getattr(config, name) for name in ("shape", "work", "precision", "steps")}
    compared = compare(given, config.pairs, Path(config.trl).resolve() if config.trl else None)
    screen.to_copy(table(compared))
    if config.output:
        write_json(Path(config.output), compared)
    else:
        screen.to_copy(json.dumps(compared))


if __name__ == "__main__":
    run_script(main)
