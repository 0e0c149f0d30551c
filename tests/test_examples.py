"""Every example trains a tiny model and saves one that loads."""

import importlib.util
import json
from pathlib import Path

import pytest
import tiny
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"
MIGRATED = ["--num_ppo_epochs", "1", "--num_mini_batches", "1", "--per_device_train_batch_size", "2"]
MIGRATED += ["--gradient_accumulation_steps", "1", "--total_episodes", "4", "--response_length", "5"]


def flags(name, folder):
    """What each example is called with."""
    if name == "trl_script_migrated":
        return ["--model_name_or_path", f"{folder}/policy", "--reward_model_path", f"{folder}/reward", *MIGRATED]
    given = ["--model", f"{folder}/policy", "--steps", "2"]
    return [*given, "--reward_model", f"{folder}/reward"] if name == "qlora" else given


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.llama().save_pretrained(folder / "policy")
    tiny.llama_reward().save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tiny.chat_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_trains_and_saves(path, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    out = tmp_path / "out"
    example.main([*flags(path.stem, models), "--output_dir", str(out)])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["val/updates"] > 0 for row in rows)
    if path.stem == "qlora":
        AutoPeftModelForCausalLM.from_pretrained(out)
    else:
        AutoModelForCausalLM.from_pretrained(out)


def test_the_loop_resumes_where_it_was_saved(models, tmp_path):
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLES / "own_loop.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    call = ["--model", f"{models}/policy", "--output_dir", str(tmp_path), "--batch", "2"]
    example.main([*call, "--steps", "6"])
    example.main([*call, "--steps", "7", "--resume"])  # from step 5
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]


def test_every_example_is_in_the_documentation():
    text = "".join(page.read_text(encoding="utf-8") for page in EXAMPLES.parent.glob("docs/*.md"))
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/{path.name}" in text, path.name
