"""The scripts under each engine on two CPU processes; models load sharded under ZeRO-3."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import workers
import yaml
from forge import said
from limits import HANG
from safetensors.torch import load_file
from tiny_recipe import recipe
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
NAMES = {"zero2": "DEEPSPEED ZeRO-2", "zero3": "DEEPSPEED ZeRO-3", "fsdp2": "FSDP2"}  # in run.json


def launch(engine, script, *argv):
    """Run a script by `accelerate launch` with a file of accelerate_configs, on two processes of their own."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{engine}.yaml").read_text())
    file = Path(argv[-1]).parent / f"{engine}.yaml"
    file.write_text(yaml.safe_dump(config | {"use_cpu": True, "num_processes": 2, "main_process_port": 0}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    changes = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*command, str(ROOT / "scripts" / f"{script}.py"), *map(str, argv)],
        env=os.environ | changes,
        capture_output=True,
        text=True,
        timeout=HANG,  # a first run under an engine compiles what it needs
    )


def stage(engine, folder, run, name, script, by_launcher=False):
    """A stage under an engine's file of accelerate_configs, or in one process if the engine is None.

    by_launcher: start it by `accelerate launch`, whose processes each import everything. Otherwise fork the ranks, with
    the environment that it would give them.
    """
    where = ["--config", folder / f"{name}.yaml", "--run", run, "--runs_dir", folder.parent / "runs"]
    if by_launcher:
        done = launch(engine, script, *where)
        assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "[rank0]" in line)[-3000:]
    elif engine is None:
        workers.run(Path(script), where, folder=folder)
    else:
        workers.run(Path(script), where, 2, engine, folder, as_shipped=True)
    facts = json.loads((folder.parent / "runs" / run / name / "run.json").read_text())
    assert (facts["status"], facts["world_size"]) == ("done", 1 if engine is None else 2)
    return facts.get("engine")


def rows(folder, run, name):
    text = (folder.parent / "runs" / run / name / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The recipe and its stages run by one process, once: every engine is compared with it."""
    top = tmp_path_factory.mktemp("engines")
    folder = recipe(top / "recipe")
    for name, script in (("reward", "train_reward"), ("ppo_full", "train_ppo"), ("ppo_lora", "train_ppo")):
        stage(None, folder, "alone", name, script)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("engine", ["zero2", "zero3", "zero3_offload", "fsdp2"])
def test_every_stage_gives_what_one_process_gives(tmp_path, alone, engine):
    runs, known = tmp_path / "runs", alone.parent / "runs" / "alone"
    once = {"gradient_accumulation_steps": 1}
    # 4 pairs on each process, of the 8 that one takes.
    two = recipe(tmp_path / "two", reward={"per_device_train_batch_size": 4}, ppo_full=once, ppo_lora=once)
    shutil.copytree(alone / "base", two / "base", dirs_exist_ok=True)
    stage(engine, two, "pairs", "reward", "train_reward")
    found, expected = (json.loads((f / "reward" / "evaluation.json").read_text()) for f in (runs / "pairs", known))
    for when in ("before", "after"):
        for figure in ("loss", "mean_margin"):
            assert found[when][figure] == pytest.approx(expected[when][figure], abs=1e-3)
    saved, weights = (load_file(f / "reward" / "model.safetensors") for f in (runs / "pairs", known))
    assert saved.keys() == weights.keys()
    # After two steps of AdamW, which move each by 1e-3. Found: 4e-5 and 1e-8.
    apart = torch.cat([(saved[name] - tensor).abs().flatten() for name, tensor in weights.items()])
    print(f"{engine}: reward weights apart by at most {apart.max():.1e}, {apart.mean():.1e} on average")
    assert apart.max() < 1e-3
    assert apart.mean() < 1e-6
    if engine == "zero3_offload":  # PPO under it is held against one process in tests/ppo/test_processes.py
        return
    shutil.copytree(known / "reward", runs / "x" / "reward")
    for name in ("ppo_full", "ppo_lora"):
        assert stage(engine, two, "x", name, "train_ppo") == NAMES[engine]
        first, same = rows(alone, "alone", name)[0], rows(two, "x", name)[0]
        for figure in [key for key in first if key.startswith(("objective/", "loss/", "value/explained"))]:
            assert same[figure] == pytest.approx(first[figure], abs=1e-4), figure
        AutoModelForCausalLM.from_pretrained(runs / "x" / name)
    stage(engine, two, "x", "evaluation", "evaluate")
    if engine == "fsdp2":
        compare, answer = ROOT / "scripts" / "compare.py", ["--prompt", "hello", "--run", "x", "--runs_dir", runs]
        said = workers.run(compare, answer, folder=two)
        assert all(f"{name}  score" in said for name in ("base", "full", "lora"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "script"), [("reward", "train_reward"), ("ppo_full", "train_ppo")])
def test_fsdp_is_refused_on_cpus(tmp_path, name, script):
    folder = recipe(tmp_path / "recipe")
    argv = ["--config", folder / f"{name}.yaml", "--run", "x"]
    if name == "ppo_full":
        tiny.gpt2_reward().save_pretrained(tmp_path / "reward")
        tiny.gpt2_tokenizer().save_pretrained(tmp_path / "reward")
        argv += ["--reward_model_path", tmp_path / "reward"]
    argv += ["--runs_dir", tmp_path / "runs"]
    logs = [tmp_path / f"rank-{rank}" for rank in range(2)]
    environments = zip(logs, workers.environments("fsdp2", 2, as_shipped=True), strict=True)
    pids = [workers.forge().start(script, argv, log, WORKER_ENGINE="as it is", **given) for log, given in environments]
    assert [workers.forge().wait(pid) for pid in pids] == [2, 2]
    for log in logs:
        assert "error: engine: expected FSDP, found MULTI_CPU; on CPUs, where Accelerate has no FSDP," in said(log)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_full", "ppo_lora"])
def test_a_policy_loaded_sharded_in_bf16_is_its_reference(tmp_path, name):
    still = {"bf16": True, "learning_rate": 0.0, "gradient_accumulation_steps": 1}
    folder = recipe(tmp_path / "recipe", **{name: still | {"reward_model_path": str(tmp_path / "reward")}})
    tiny.gpt2_reward().save_pretrained(tmp_path / "reward")
    tiny.gpt2_tokenizer().save_pretrained(tmp_path / "reward")
    by_launcher = name == "ppo_full"  # once is enough to see that it starts the same
    assert stage("zero3", folder, "x", name, "train_ppo", by_launcher) == "DEEPSPEED ZeRO-3"
    first = rows(folder, "x", name)[0]
    assert first["objective/kl_exact_per_token"] == pytest.approx(0, abs=1e-5)
    assert first["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["policy/grad_norm"] > 0
