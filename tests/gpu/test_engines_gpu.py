"""DeepSpeed's ZeRO and FSDP2 on one process of a GPU are the plain run; tests/ppo/test_processes.py has CPUs."""

import os
import subprocess
import sys

import pytest
import tiny
from tiny_ppo import metrics, timeless, trainer

OPTIONS = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "response_length": 12}
WORKER = """
import os, sys
from tiny_ppo import trainer
run = trainer(sys.argv[1], lora=sys.argv[2] == "lora", **{options})
run.train()
run.save_model()
print("on", run.accelerator.device, run.accelerator.distributed_type.value, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_an_engine_of_one_process_is_the_plain_run(tmp_path, only_on_a_gpu, engine, kind):
    options = OPTIONS | {"use_cpu": False}
    trainer(tmp_path / "plain", lora=kind == "lora", **options).train()
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("{options}", repr(options)))
    config = tiny.ROOT / "accelerate_configs" / f"{engine}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "1"]
    paths = os.pathsep.join([str(tiny.ROOT), str(tiny.ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*map(str, launch), "--main_process_port", "0", str(script), str(tmp_path / engine), kind],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "on cuda:0 " + ("FSDP" if engine == "fsdp2" else "DEEPSPEED") in done.stdout
    for plain, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / engine), strict=True):
        for name in ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "val/ratio"):
            assert timeless(other)[name] == pytest.approx(timeless(plain)[name], rel=1e-3, abs=1e-4), name
