"""The policy on the hub: huggingface_hub's own client against a server on the loopback interface."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import workers
from accelerate import PartialState
from hub_server import HubServer
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from tiny_ppo import trainer

from rlhf.models.lora import add_lora
from rlhf.ppo.export import push_policy, save_policy, with_weights, without_weights

TESTS = Path(__file__).parents[1]
# HF_ENDPOINT is read when huggingface_hub is imported, so each of these imports it itself.
PUSH = """
import json, sys, torch
from tiny_ppo import trainer
run = trainer(**json.loads(sys.argv[1]))
run.train()
address = run.push_to_hub("By hand", dataset_name="our/prompts", tags=["tiny"])
with torch.no_grad():
    logits = run.roles.trained.policy.eval()(torch.tensor([[5, 6, 7]])).logits
print(json.dumps([address, logits.tolist()]))
"""
PULL = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained("someone/tuned")
model = AutoModelForCausalLM.from_pretrained("someone/tuned")
with torch.no_grad():
    print(json.dumps(model(torch.tensor([[5, 6, 7]])).logits.tolist()))
"""
TRAIN = """
import json, sys
from tiny_ppo import trainer
for options in json.loads(sys.argv[1]):
    trainer(**options).train()
print("null")
"""
SAVING = {"save_strategy": "steps", "save_steps": 1, "report_to": "tensorboard"}


def output(code: str, given: Any, hub: HubServer, home: Path, folder: Path) -> Any:
    """What code, run in folder, prints as its last line of JSON; libraries may print warnings before it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    env = clean | settings | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    done = workers.python(["-c", code, json.dumps(given)], env, folder, 120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_only_the_policy(hub: HubServer, folder: Path) -> None:
    """The run left checkpoints and events in folder, and uploaded neither."""
    assert list(folder.glob("checkpoints/*/*"))
    assert list(folder.glob("tensorboard/**/events*"))
    for _, _, paths in hub.commits:
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "metrics.jsonl"} <= set(paths)
        assert not [path for path in paths if path.startswith(("checkpoints", "tensorboard"))]


def test_a_policy_pushed_is_the_policy_pulled(tmp_path):
    folder = tmp_path / "run"
    options = {"folder": str(folder), "max_steps": 1, "hub_model_id": "someone/tuned"} | SAVING
    with HubServer({}) as hub:
        address, here = output(PUSH, options, hub, home=tmp_path / "from", folder=tmp_path)
        there = output(PULL, None, hub, home=tmp_path / "to", folder=tmp_path)
    assert there == here
    assert address == f"{hub.url}/someone/tuned/commit/{hub.repos['models/someone/tuned'].sha}"
    assert [commit[:2] for commit in hub.commits] == [("someone/tuned", "By hand")]
    assert_only_the_policy(hub, folder)
    card = hub.repos["models/someone/tuned"].files["README.md"].decode()
    before, facts, _ = card.split("---\n")
    assert before == ""
    lines = {"library_name: transformers", "datasets:", "- our/prompts", "tags:", "- ppo", "- rlhf", "- tiny"}
    assert set(facts.splitlines()) == lines | {"pipeline_tag: text-generation"}
    assert "# `someone/tuned`" in card
    assert "model = AutoModelForCausalLM.from_pretrained('someone/tuned')" in card
    assert str(tmp_path) not in card


def test_training_pushes_at_the_end_or_at_every_save(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    end = {"folder": str(tmp_path / "end"), "hub_strategy": "end", "hub_model_id": "someone/end"}
    every_save = {"folder": ".", "hub_strategy": "every_save"}  # no hub_model_id: the folder's name
    runs = [run | SAVING | {"max_steps": 2, "push_to_hub": True} for run in (end, every_save)]
    with HubServer({}) as hub:
        output(TRAIN, runs, hub, home=tmp_path / "home", folder=here)
    assert [commit[:2] for commit in hub.commits] == [
        ("someone/end", "End of training"),
        ("someone/here", "Step 1"),
        ("someone/here", "Step 2"),
        ("someone/here", "End of training"),
    ]
    for folder in (tmp_path / "end", here):
        assert_only_the_policy(hub, folder)


@pytest.mark.parametrize(
    ("options", "created", "uploaded"),
    [
        ({}, {"private": None}, {"revision": None}),
        ({"hub_private_repo": True, "hub_revision": "try-2"}, {"private": True}, {"revision": "try-2"}),
    ],
)
def test_the_repository_is_made_as_asked_for_and_gets_the_branch(tmp_path, monkeypatch, options, created, uploaded):
    calls = []

    class Hub:
        def __init__(self, token):
            calls.append({"token": token})

        def create_repo(self, repo_id, **given):
            calls.append({"repo_id": repo_id} | given)
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

        def upload_folder(self, **given):
            calls.append(given)
            return "commit"

    monkeypatch.setattr("rlhf.ppo.export.HfApi", Hub)
    run = trainer(tmp_path / "run", max_steps=1, hub_model_id="tuned", hub_token="hf_x", **options)
    assert run.push_to_hub("By hand") == "commit"
    token, create, upload = calls
    assert token == {"token": "hf_x"}
    assert create == {"repo_id": "tuned", "exist_ok": True} | created
    assert upload["repo_id"] == "someone/tuned"
    assert upload["commit_message"] == "By hand"
    assert upload["folder_path"] == tmp_path / "run"
    assert {name: upload[name] for name in uploaded} == uploaded
    files = ["model.safetensors", "README.md", "run.json", ".lock", "checkpoints/step-1/step.json", "tensorboard/e.1"]
    assert list(filter_repo_objects(files, ignore_patterns=upload["ignore_patterns"])) == files[:2]


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_policy_has_the_names_of_transformers_4_as_well(tmp_path, lora):
    policy = add_lora(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", r=2)) if lora else tiny.llama()
    save_policy(policy, tiny.chat_tokenizer(), tmp_path / "saved", PartialState(), {"config": {}})
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["torch_dtype"], config["rope_theta"]) == ("float32", config["rope_parameters"]["rope_theta"])
    assert (tmp_path / "saved" / "adapter").is_dir() == lora


def test_a_model_without_weights_takes_those_of_another():
    policy, other = tiny.gpt2(), tiny.gpt2(seed=5)
    policy.transformer.wpe.requires_grad_(False)
    empty = without_weights(policy)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert [p.requires_grad for p in empty.parameters()] == [p.requires_grad for p in policy.parameters()]
    assert {p.device.type for p in policy.parameters()} == {"cpu"}
    full = with_weights(empty, other.state_dict())
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(full(ids).logits, other(ids).logits)
    assert full.lm_head.weight is full.transformer.wte.weight
    assert {p.device.type for p in empty.parameters()} == {"meta"}  # for the next time


def test_other_ranks_push_nothing(tmp_path):
    other = SimpleNamespace(is_main_process=False)
    assert push_policy(tmp_path, None, other, "End", {"config": {}}, None, []) is None
