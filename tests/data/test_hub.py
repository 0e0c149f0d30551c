"""Data and models from the hub: huggingface_hub's own client against a server on the loopback interface.

Each load is a process of its own, as HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are read when the client is
imported.
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "../shared/data"
sys.path.insert(0, str(ROOT / "tests"))  # for hub_server, wherever pytest is started

from hub_server import HubServer  # noqa: E402

LOAD = """
import dataclasses, json, sys
from rlhf.data.hh_rlhf import load_pairs
from rlhf.data.oasst import load_prompts
from rlhf.errors import UserError
try:
    pairs, pair_counts = load_pairs(sys.argv[1], data_dir="harmless-base")
    prompts, prompt_counts = load_prompts([sys.argv[2]])
except UserError as error:
    sys.exit(f"UserError: {error}")
items = [dataclasses.asdict(item) for item in [*pairs, *prompts]]
print(json.dumps([pair_counts, prompt_counts, items]))
"""
LOAD_MODEL = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = AutoTokenizer.from_pretrained(sys.argv[1])("ab ba")["input_ids"]
print(ids, model(torch.tensor([ids])).logits.double().sum().item())
"""
ALL_SUBSETS = """
import sys
from rlhf.data.hh_rlhf import load_pairs
from rlhf.errors import UserError
try:
    pairs, counts = load_pairs(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None)
except UserError as error:
    sys.exit(f"UserError: {error}")
print([pair.source for pair in pairs], counts["rows"])
"""
HUB_IDS = ("Anthropic/hh-rlhf", "OpenAssistant/oasst1")


def run(code: str, *args: str, home: Path, endpoint: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "1" if offline else "0"}
    env = clean | settings | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=240)


def output(*args: str, **kwargs: Any) -> str:
    done = run(*args, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dialogue(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def write_gz(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def pair_row(question: str) -> dict[str, str]:
    return {"chosen": dialogue(question, "yes"), "rejected": dialogue(question, "no")}


def oasst_rows() -> list[dict[str, Any]]:
    if (real := DATA / "oasst/messages.jsonl.gz").exists():
        return [json.loads(line) for line in gzip.open(real, "rt", encoding="utf-8")]
    common = {"message_tree_id": "t", "deleted": False}
    texts = [("prompter", "en", "One?"), ("assistant", "en", "1."), ("prompter", "de", "Zwei?")]
    return [
        {"message_id": str(number), "role": role, "lang": lang, "text": text, **common}
        for number, (role, lang, text) in enumerate(texts)
    ]


def make_data(folder: Path) -> tuple[Path, Path]:
    """The repositories as on the hub: four folders of pairs, the red team's; two parquet files, trees."""
    from datasets import Dataset

    hh, oasst = folder / "hh-rlhf", folder / "oasst1"
    for subset in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"):
        write_gz(hh / subset / "test.jsonl.gz", [pair_row(f"{subset} test?")])
        write_gz(hh / subset / "train.jsonl.gz", [pair_row(f"{subset} train {number}?") for number in range(2)])
    write_gz(hh / "red-team-attempts/red_team_attempts.jsonl.gz", [{"transcript": dialogue("q", "a")}])
    (hh / "README.md").write_text("# pairs\n")
    if (real := DATA / "hh-rlhf/harmless-base.jsonl.gz").exists():
        (hh / "harmless-base/test.jsonl.gz").write_bytes(real.read_bytes())
    rows = oasst_rows()
    keep = ("message_id", "message_tree_id", "role", "lang", "text", "deleted")
    table = [{name: row[name] for name in keep} for row in rows]
    (oasst / "data").mkdir(parents=True)
    for name, part in (("train", table[:-1]), ("validation", table[-1:])):
        Dataset.from_list(part).to_parquet(oasst / f"data/{name}-00000-of-00001.parquet")
    write_gz(oasst / "2023-04-12_oasst_all.trees.jsonl.gz", [{"not": "to be read"}])
    return hh, oasst


def make_model(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "Ġ": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    fast.save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=1, n_head=2)).save_pretrained(folder)
    return folder


def test_data_from_the_hub_is_the_local_data_then_also_offline(tmp_path: Path) -> None:
    hh, oasst = make_data(tmp_path / "repos")
    home, empty = tmp_path / "home", tmp_path / "empty"
    home.mkdir()
    empty.mkdir()
    local = output(LOAD, str(hh), str(oasst), home=empty, endpoint="http://127.0.0.1:9", offline=True)
    pair_counts, prompt_counts, items = json.loads(local)
    files = [gzip.decompress(path.read_bytes()) for path in (hh / "harmless-base").iterdir()]
    rows = sum(content.count(b"\n") for content in files)
    assert pair_counts["rows"] == rows
    assert prompt_counts["messages"] == len(oasst_rows())
    assert len(items) == pair_counts["kept"] + prompt_counts["kept"] > 0

    with HubServer({"datasets/Anthropic/hh-rlhf": hh, "datasets/OpenAssistant/oasst1": oasst}) as server:
        assert output(LOAD, *HUB_IDS, home=home, endpoint=server.url) == local
        fetched = {
            request.split("/resolve/")[1].split("/", 1)[1] for request in server.requests if "/resolve/" in request
        }
    assert fetched == {
        "harmless-base/test.jsonl.gz",
        "harmless-base/train.jsonl.gz",
        "data/train-00000-of-00001.parquet",
        "data/validation-00000-of-00001.parquet",
    }
    assert output(LOAD, *HUB_IDS, home=home, endpoint=server.url, offline=True) == local
    # The server is gone but nobody said so: the cache stands in as well.
    assert output(LOAD, *HUB_IDS, home=home, endpoint=server.url) == local

    failed = run(LOAD, *HUB_IDS, home=empty, endpoint=server.url, offline=True)
    assert_user_error(failed, "Anthropic/hh-rlhf: expected a local path or a hub data set")
    # All four subsets are asked for, one is cached: a quarter of the data must not pass for all of it.
    assert_user_error(run(ALL_SUBSETS, HUB_IDS[0], home=home, endpoint=server.url, offline=True), HUB_IDS[0])


def assert_user_error(done: subprocess.CompletedProcess[str], start: str) -> None:
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "Error" in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"UserError: {start}")
    assert "scripts/prepare.py" in lines[0]
    assert "Traceback" not in done.stderr


def test_all_subsets_by_default_and_never_the_red_team(tmp_path: Path) -> None:
    hh, _ = make_data(tmp_path / "repos")
    write_gz(hh / "harmless-base/test.jsonl.gz", [pair_row("crafted?")])
    with HubServer({"datasets/Anthropic/hh-rlhf": hh}) as server:
        printed = output(ALL_SUBSETS, HUB_IDS[0], home=tmp_path, endpoint=server.url)
        assert not [request for request in server.requests if "red" in request]
        missing = run(ALL_SUBSETS, "Nobody/nothing", home=tmp_path, endpoint=server.url)
        revision = run(ALL_SUBSETS, HUB_IDS[0], "v9", home=tmp_path, endpoint=server.url)
    subsets = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
    sources = [f"{s}/{place}" for s in subsets for place in ("test.jsonl.gz:1", "train.jsonl.gz:1", "train.jsonl.gz:2")]
    assert printed.strip() == f"{sources} 12"
    assert_user_error(missing, "Nobody/nothing: expected a local path or a hub data set")
    assert_user_error(revision, "Anthropic/hh-rlhf: expected a local path or a hub data set at revision 'v9'")


def test_a_model_from_the_hub_is_the_local_model_then_also_offline(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = make_model(tmp_path / "gpt2")
    repo_id = "openai-community/gpt2-medium"
    local = output(LOAD_MODEL, str(folder), home=tmp_path, endpoint="http://127.0.0.1:9", offline=True)
    assert local.startswith("[1, 2, 3, 2, 1] ")
    with HubServer({f"models/{repo_id}": folder}) as server:
        assert output(LOAD_MODEL, repo_id, home=tmp_path, endpoint=server.url) == local
    assert output(LOAD_MODEL, repo_id, home=tmp_path, endpoint=server.url, offline=True) == local
