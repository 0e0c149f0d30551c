"""The dry run's estimate of memory and steps, compared with what the run takes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import workers
import yaml
from datasets import Dataset
from limits import HANG
from tiny_recipe import recipe
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf.cli import train_ppo, train_reward
from rlhf.cli.script import run_script
from rlhf.memory_estimate import account as memory
from rlhf.memory_estimate.account import GB, Part, Sharding, by_rows, peak

ROOT = Path(__file__).parents[2]


def ask(main, monkeypatch, capsys, *argv):
    monkeypatch.setattr("sys.argv", ["script", *map(str, argv), "--dry_run", "true"])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    said = capsys.readouterr()
    return stop.value.code, said.out, [line for line in said.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def study(tmp_path):
    """A recipe, and the reward stage of its run as if trained."""
    folder = recipe(tmp_path / "recipe")
    reward = tmp_path / "runs" / "tiny" / "reward"
    tiny.gpt2_reward().save_pretrained(reward)
    tiny.gpt2_tokenizer().save_pretrained(reward)
    (reward / "run.json").write_text(json.dumps({"stage": "reward", "status": "done"}))
    return folder, ["--run", "tiny", "--runs_dir", tmp_path / "runs"]


def test_ppo_says_roles_steps_and_memory_and_leaves_nothing(study, monkeypatch, capsys, tmp_path):
    folder, where = study
    code, said, _ = ask(train_ppo.main, monkeypatch, capsys, "--config", folder / "ppo_lora.yaml", *where)
    assert code == 0, said
    assert "engine NO, 1 processes, 3 PPO steps" in said  # 10 prompts in batches of 4
    assert re.search(r"policy: .*base, [\d,]+ parameters, [\d,]+ trained \(\d+\.\d+%\)", said)
    assert re.search(r"peak: \d+\.\d+ GB of", said)
    assert sorted(p.name for p in (tmp_path / "runs" / "tiny").iterdir()) == ["reward"]


def test_reward_says_pairs_and_steps(study, monkeypatch, capsys):
    folder, where = study
    where[1] = "other"
    code, said, _ = ask(train_reward.main, monkeypatch, capsys, "--config", folder / "reward.yaml", *where)
    assert code == 0, said
    assert "engine NO, 1 processes\n16 pairs, 2 steps of 8" in said


@pytest.mark.parametrize("by_flags", [True, False], ids=["flags", "recipe"])
def test_columns_of_other_names(study, monkeypatch, capsys, by_flags):
    """A data set that `datasets` has saved, for pairs and for prompts."""
    folder, where = study
    data = str(folder / "data")
    rows = [{"q": f"What is {i}?", "good": "A number.", "bad": "No."} for i in range(32)]
    Dataset.from_list(rows).save_to_disk(data)
    stages = {
        "reward": (train_reward, "dataset_name", "dataset_columns", ["prompt=q", "chosen=good", "rejected=bad"]),
        "ppo_full": (train_ppo, "prompt_dataset", "prompt_columns", ["prompt=q"]),
    }
    found = []
    for stage, (script, source, field, columns) in stages.items():
        given = [f"--{source}", data, f"--{field}", *columns] if by_flags else []
        if not by_flags:
            recipe(folder.with_name(stage), **{stage: {source: data, field: columns}})
        file = (folder if by_flags else folder.with_name(stage)) / f"{stage}.yaml"
        run = ["--run", {"reward": "other"}.get(stage, "tiny"), *where[2:]]
        code, said, errors = ask(script.main, monkeypatch, capsys, "--config", file, *run, *given)
        assert (code, errors) == (0, []), said
        found.append(said)
    assert "layout_prompt_text 32" in found[0]
    assert "16 pairs, 2 steps of 8" in found[0]
    assert "layout_prompt_text 32" in found[1]
    assert "3 PPO steps" in found[1]


@pytest.mark.parametrize("stage", ["ppo_full", "ppo_lora"])
def test_before_the_reward_stage_its_model_is_assumed_to_be_as_large_as_the_base(study, monkeypatch, capsys, stage):
    folder, where = study
    argv = ["--config", folder / f"{stage}.yaml", *where]
    known = ask(train_ppo.main, monkeypatch, capsys, *argv)[1]
    code, said, _ = ask(train_ppo.main, monkeypatch, capsys, *argv, "--run", "new")
    assert code == 0, said
    assert f"reward model: not trained yet; assumed to be as large as {folder / 'base'}" in said

    def table(text):
        return [line for line in text.splitlines() if re.match(r"(policy|critic|reward) +\d", line)]

    assert table(said) == table(known) != []


def test_a_stage_that_is_done_is_estimated_too(study, monkeypatch, capsys, tmp_path):
    folder, where = study
    code, said, _ = ask(train_reward.main, monkeypatch, capsys, "--config", folder / "reward.yaml", *where)
    assert (code, "already done" in said) == (0, False)
    assert re.search(r"peak: \d+\.\d+ GB of", said)
    assert json.loads((tmp_path / "runs" / "tiny" / "reward" / "run.json").read_text())["status"] == "done"


def test_what_a_pass_keeps_once_is_not_counted_per_row():
    """Weights of 100 bytes cast once, 7 bytes per row, by hand."""
    assert [by_rows(lambda rows: 100 + 7 * rows, n) for n in (1, 2, 16)] == [107, 114, 212]


def test_too_little_memory_is_an_error(study, monkeypatch, capsys):
    monkeypatch.setattr(memory, "device_bytes", lambda use_cpu: 0.1 * GB)
    folder, where = study
    code, _, errors = ask(train_ppo.main, monkeypatch, capsys, "--config", folder / "ppo_full.yaml", *where)
    assert code == 2
    assert re.fullmatch(r"error: memory: the run needs \d+\.\d GB per device, but 0\.1 GB are available; .*", errors[0])


def test_a_model_without_weights_is_an_error(study, monkeypatch, capsys):
    folder, where = study
    (folder / "base" / "model.safetensors").unlink()
    code, _, errors = ask(train_ppo.main, monkeypatch, capsys, "--config", folder / "ppo_full.yaml", *where)
    assert code == 2
    assert "expected weights as .safetensors, found none" in errors[0]


def test_a_folder_that_cannot_be_written_is_an_error(study, monkeypatch, capsys, tmp_path):
    folder, _ = study
    (tmp_path / "file").write_text("")
    where = ["--run", "x", "--runs_dir", tmp_path / "file"]
    code, _, errors = ask(train_reward.main, monkeypatch, capsys, "--config", folder / "reward.yaml", *where)
    assert code == 2
    assert "cannot write to" in errors[0]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["--response_length", "250"],
            r"error: train_dataset: expected prompts of at most 6 tokens, so that response_length=250 more fit the "
            r"model's 256 positions, found one of \d+; see max_prompt_tokens and long_prompts",
        ),
        (["--max_prompt_tokens", "5"], r"error: train_dataset row 0: expected 1 to 5 tokens, found \d+"),
    ],
)
def test_prompts_are_refused_as_the_run_would_refuse_them(study, monkeypatch, capsys, argv, expected):
    folder, where = study
    told = []
    for dry in ("true", "false"):
        command = ["--config", folder / "ppo_full.yaml", *where, *argv, "--dry_run", dry]
        monkeypatch.setattr("sys.argv", ["script", *map(str, command)])
        with pytest.raises(SystemExit):
            run_script(train_ppo.main)
        told += [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(expected, told[0])
    assert told == told[:1] * 2


def test_long_prompts_may_be_left_out(study, monkeypatch, capsys):
    folder, where = study
    argv = ["--response_length", "200", "--max_prompt_tokens", "56", "--long_prompts", "drop"]
    code, said, errors = ask(train_ppo.main, monkeypatch, capsys, "--config", folder / "ppo_full.yaml", *where, *argv)
    assert code == 0, errors
    assert "PPO steps" in said


def test_pairs_longer_than_the_model_are_refused(study, monkeypatch, capsys):
    folder, where = study
    where[1] = "other"
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps(config | {"n_positions": 16}))
    code, _, errors = ask(train_reward.main, monkeypatch, capsys, "--config", folder / "reward.yaml", *where)
    assert code == 2
    assert re.fullmatch(
        r"error: max_length: set it to 16 or less, the model's positions; the longest pair has \d+ tokens", errors[0]
    )


@pytest.mark.parametrize(("name", "script"), [("ppo_full", train_ppo), ("reward", train_reward)])
def test_an_engine_that_training_refuses_is_refused(study, monkeypatch, capsys, name, script):
    folder, where = study
    where[1] = "tiny" if name == "ppo_full" else "other"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    code, said, errors = ask(script.main, monkeypatch, capsys, "--config", folder / f"{name}.yaml", *where)
    assert code == 2, said
    assert errors[0].startswith("error: engine: expected FSDP, found NO; on CPUs, where Accelerate has no FSDP,")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_full", "ppo_lora"])
def test_zero3_is_counted_and_not_applied(study, tmp_path, name):
    """Under ZeRO-3 a model cannot be copied, and its layers do not run without the engine."""
    folder, where = study
    argv = ["--config", folder / f"{name}.yaml", *where, "--dry_run", "true"]
    said = workers.run(Path("train_ppo"), argv, 2, "zero3", tmp_path, as_shipped=True)
    assert said.count("engine DEEPSPEED ZeRO-3, 2 processes, 2 PPO steps") == 1  # 10 prompts in batches of 8
    assert said.count("peak: ") == 1


def test_what_each_stage_spreads():
    """100 parameters of 4 bytes under AdamW on 4 processes, by hand."""
    model = torch.nn.Linear(100, 1, bias=False)

    def taken(stage):
        part = Sharding(stage, 4).trained("policy", model, "adamw_torch")
        return part.weights, part.optimizer, part.gradients, part.rollout

    assert taken(0) == (400, 800, 800, 0)  # gradients, and the buckets they are sent in
    assert taken(1) == (400, 300, 400, 0)  # two states and a copy of the weights, a quarter of each
    assert taken(2) == (400, 300, 100, 0)
    assert taken(3) == (100, 300, 100, 300)  # whole while responses are made
    assert Sharding(3, 4).frozen("reward", model) == Part("reward", 100, rollout=300)
    assert Sharding(0, 1).trained("policy", model, "adamw_bnb_8bit").optimizer == 200
    # In main memory until they are gathered for a rollout.
    offloaded = Sharding(3, 4, offload=True, offload_weights=True)
    assert offloaded.trained("policy", model, "adamw_torch") == Part("policy", 0, 0, 100, rollout=400)
    # bf16 under ZeRO-2: weights and gradients of 2 bytes, states and a copy of the weights of 4.
    half = Sharding(2, 4, half=True)
    assert half.trained("policy", model, "adamw_torch") == Part("policy", 200, 300, 50)
    assert half.frozen("reward", model) == Part("reward", 200)


def test_the_peak_is_what_is_there_at_once():
    parts = [Part("policy", 5, 10, 5), Part("activations", rollout=3, learning=7), Part("merged", saving=6)]
    assert peak(parts, 1, keeps_freed=False) == 1 + 15 + 12
    # Half of the rollout's memory is in pieces that the update cannot use.
    assert peak(parts, 1, keeps_freed=True) == 1 + 15 + 12 + 1.5 + 6


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo_full", "ppo_lora"])
def test_the_estimate_is_within_a_quarter_of_the_peak(tmp_path, stage):
    """45 million parameters, so that the models outweigh the process."""
    config = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    config |= {"vocab_size": 16000, "max_position_embeddings": 512, "eos_token_id": 2, "pad_token_id": 2}
    folder = recipe(tmp_path / "recipe", **{stage: {"response_length": 32}})
    shutil.rmtree(folder / "base")
    reward = tmp_path / "runs" / "big" / "reward"
    for model, path in (
        (LlamaForCausalLM(LlamaConfig(**config)), folder / "base"),
        (LlamaForSequenceClassification(LlamaConfig(**config, num_labels=1)), reward),
    ):
        model.save_pretrained(path)
        tiny.chat_tokenizer().save_pretrained(path)
    (reward / "run.json").write_text(json.dumps({"stage": "reward", "status": "done"}))
    settings = yaml.safe_load((folder / f"{stage}.yaml").read_text()) | {"per_device_train_batch_size": 4}
    settings |= {"max_steps": 2}  # the second one has the optimizer's states beside its gradients
    (folder / f"{stage}.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(ROOT / "scripts" / "train_ppo.py"), "--config", str(folder / f"{stage}.yaml")]
    command += ["--run", "big", "--runs_dir", str(tmp_path / "runs")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    environment |= dict.fromkeys(["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"], "4294967296")
    # Not a fork: the memory of the process itself is part of the estimate.
    dry = subprocess.run(
        [*command, "--dry_run", "true"], env=environment, capture_output=True, text=True, timeout=HANG, check=True
    )
    estimate = float(re.search(r"peak: (\d+\.\d+) GB", dry.stdout)[1])
    # A process of its own in between, so that the peak is this child's alone.
    watch = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
    watch += "print('kilobytes', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    real = subprocess.run(
        [sys.executable, "-c", watch, *command], env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert real.returncode == 0, real.stderr[-2000:]
    measured = int(re.search(r"kilobytes (\d+)", real.stdout)[1]) * 1024 / GB
    print(dry.stdout)
    print(f"{stage}: estimated {estimate:.2f} GB, measured {measured:.2f} GB")
    assert measured == pytest.approx(estimate, rel=0.25)
