"""A run on two processes is the run on one, up to floating point."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

TESTS = Path(__file__).parents[1]
WORKER = """
import json, sys
from rlhf.runtime.engine import numel
from tiny_ppo import trainer
options = json.loads(sys.argv[1])
run = trainer(**options)
run.train()
own = [p.numel() for p in run.roles.trained.parameters()]
whole = [numel(p) for p in run.roles.trained.parameters()]
run.save_model()
print("held here", sum(own), "of", sum(whole), flush=True)
run.accelerator.end_training()
"""


ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def train(folder: Path, processes: int, lora: bool, engine: str = "ddp") -> list[dict[str, float]]:
    """11 prompts, of 1 or 16 repetitions, in batches of 8: the second batch leaves ranks without a last row."""
    options = {
        "folder": str(folder),
        "lora": lora,
        "optim": "sgd",
        "learning_rate": 0.05,
        "num_mini_batches": 2,
        "max_grad_norm": 0.0,
        "rows": [{"prompt": [{"role": "user", "content": "hello there " * (16 if i % 2 else 1)}]} for i in range(11)],
    }
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8 // processes}
    folder.mkdir()
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable]
    paths = f"{TESTS}{os.pathsep}{TESTS.parent}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if engine == "ddp":
        environment["ACCELERATE_USE_CPU"] = "true"
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    else:  # ACCELERATE_USE_CPU would turn DeepSpeed off
        config = yaml.safe_load((TESTS.parent / "accelerate_configs" / f"{engine}.yaml").read_text())
        changed = config | {"use_cpu": True, "num_processes": processes, "main_process_port": 0}
        if engine == "zero3":  # a file of one's own, since DeepSpeed leaves parameters as small as these whole
            (folder / "deepspeed.json").write_text(json.dumps(ZERO3))
            changed["deepspeed_config"] = {"deepspeed_config_file": str(folder / "deepspeed.json")}
            del changed["mixed_precision"]  # in the file's competence, then
        (folder / "engine.yaml").write_text(yaml.safe_dump(changed))
        command += ["-m", "accelerate.commands.launch", "--config_file", str(folder / "engine.yaml")]
        environment |= {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, str(worker), json.dumps(options)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if engine == "zero3":
        held = re.findall(r"held here (\d+) of (\d+)", done.stdout)
        assert len(held) == processes, done.stdout
        assert all(int(own) == 0 < int(whole) for own, whole in held), done.stdout
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """lora -> folder and metrics of the run on one process, made once."""
    made = {}

    def run(lora):
        if lora not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[lora] = folder, train(folder, 1, lora)
        return made[lora]

    return run


@pytest.mark.parametrize(
    ("engine", "processes", "lora"),
    [
        ("ddp", 2, False),
        ("ddp", 2, True),
        slow("ddp", 4, False),
        slow("zero2", 2, False),
        slow("zero2", 2, True),
        slow("zero3", 2, False),
        slow("zero3", 2, True),
    ],
)
def test_several_processes_give_what_one_gives(tmp_path, alone, lora, engine, processes):
    folder, one = alone(lora)
    two = train(tmp_path / "two", processes, lora, engine)
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2, 3, 4]
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            # DeepSpeed has one gradient norm for both roles.
            if name != "eps" and not name.startswith("time/") and not (engine != "ddp" and "grad_norm" in name):
                assert second[name] == pytest.approx(first[name], abs=1e-4), name
    weights = [load_file(path / "model.safetensors") for path in (folder, tmp_path / "two")]
    for name, tensor in weights[0].items():
        assert_close(weights[1][name], tensor, atol=1e-5, rtol=0)
