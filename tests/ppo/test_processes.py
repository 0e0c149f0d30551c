"""A run on two processes is the run on one, up to floating point."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

TESTS = Path(__file__).parents[1]
WORKER = """
import json, sys
from tiny_ppo import trainer
options = json.loads(sys.argv[1])
run = trainer(**options)
run.train()
run.save_model()
run.accelerator.end_training()
"""


def train(folder: Path, processes: int, lora: bool) -> list[dict[str, float]]:
    """7 prompts in batches of 4, so that the second batch leaves one of two ranks without a last row."""
    options = {"folder": str(folder), "lora": lora, "optim": "sgd", "learning_rate": 0.05, "num_mini_batches": 2}
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // processes}
    folder.mkdir()
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = f"{TESTS}{os.pathsep}{TESTS.parent}"
    environment = os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(worker), json.dumps(options)], env=environment, check=True, timeout=240)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_processes_give_what_one_gives(tmp_path, lora):
    one, two = train(tmp_path / "one", 1, lora), train(tmp_path / "two", 2, lora)
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2, 3, 4]
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            if name != "eps" and not name.startswith("time/"):
                assert second[name] == pytest.approx(first[name], abs=1e-4), name
    weights = [load_file(tmp_path / run / "model.safetensors") for run in ("one", "two")]
    for name, tensor in weights[0].items():
        assert_close(weights[1][name], tensor, atol=1e-5, rtol=0)
