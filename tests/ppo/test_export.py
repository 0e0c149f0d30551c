"""The policy on the hub: huggingface_hub's own client against a server on the loopback interface."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

TESTS = Path(__file__).parents[1]
# HF_ENDPOINT is read when huggingface_hub is imported, so this is a process of its own.
PUSH = """
import json, sys, torch
from tiny_ppo import trainer
options = json.loads(sys.argv[1])
run = trainer(**options, hub_model_id="someone/tuned", report_to="tensorboard")
run.train()
if not run.args.push_to_hub:
    print(run.push_to_hub("By hand", dataset_name="our/prompts", tags=["tiny"]))
with torch.no_grad():
    print(run.roles.trained.policy.eval()(torch.tensor([[5, 6, 7]])).logits.double().sum().item())
"""
PULL = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained("someone/tuned")
model = AutoModelForCausalLM.from_pretrained("someone/tuned")
with torch.no_grad():
    print(model(torch.tensor([[5, 6, 7]])).logits.double().sum().item())
"""


def output(code: str, *args: str, hub: HubServer, home: Path) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1"}
    env = clean | settings | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_policy_pushed_is_the_policy_pulled(tmp_path):
    with HubServer({}) as hub:
        options = {"folder": str(tmp_path / "run"), "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        address, here = output(PUSH, json.dumps(options), hub=hub, home=tmp_path)
        (there,) = output(PULL, hub=hub, home=tmp_path)
        assert float(there) == pytest.approx(float(here), abs=1e-4)
        ((repo, message, paths),) = hub.commits
        card = hub.repos["models/someone/tuned"].files["README.md"].decode()
    assert (repo, message) == ("someone/tuned", "By hand")
    assert address.startswith(f"{hub.url}/someone/tuned/commit/")
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "metrics.jsonl"} <= set(paths)
    assert not [path for path in paths if path.startswith(("checkpoints", "tensorboard"))]
    for word in ("- ppo", "- tiny", "our/prompts"):
        assert word in card


@pytest.mark.parametrize(
    ("strategy", "messages"),
    [("end", ["End of training"]), ("every_save", ["Step 1", "Step 2", "End of training"])],
)
def test_training_pushes_when_asked_to(tmp_path, strategy, messages):
    options = {"folder": str(tmp_path / "run"), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    options |= {"push_to_hub": True, "hub_strategy": strategy}
    with HubServer({}) as hub:
        output(PUSH, json.dumps(options), hub=hub, home=tmp_path)
        assert [message for _, message, _ in hub.commits] == messages
