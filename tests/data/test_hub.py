"""Data and models from the hub: huggingface_hub's own client against a server on the loopback interface.

A process takes seconds to start, so that each does all that its settings allow.
"""

import gzip
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from hub_data import DATA, NOBODY, SUBSETS, make_messages, make_pairs, make_policy, messages, pair_row, run, write_gz
from hub_server import HubServer

LOAD = """
import dataclasses, json, sys
from rlhf.data.hh_rlhf import load_pairs
from rlhf.data.oasst import load_prompts
from rlhf.errors import UserError
from rlhf.models.load import load_causal_lm, load_tokenizer, new_reward_model

def data(pairs_from, prompts_from):
    pairs, pair_counts = load_pairs(pairs_from, data_dir="harmless-base")
    prompts, prompt_counts = load_prompts([prompts_from])
    return [pair_counts, prompt_counts, [dataclasses.asdict(item) for item in [*pairs, *prompts]]]

def model(name):
    tokenizer, policy = load_tokenizer(name), load_causal_lm(name)
    reward = new_reward_model(name, tokenizer)
    total = sum(p.double().abs().sum().item() for p in policy.parameters())
    return [tokenizer("ab ba")["input_ids"], total, reward.config.num_labels]

def subsets(*source):
    pairs, counts = load_pairs(source[0], revision=source[1] if len(source) > 1 else None)
    return [[pair.source for pair in pairs], counts["rows"]]

def chosen_files(source, folder, columns):
    pairs, counts = load_pairs(source, folder, None, columns)
    prompts = load_prompts([source], data_dir=folder, columns=columns)[0]
    return [[pair.opening for pair in pairs], [prompt.text for prompt in prompts], counts["layout_prompt_text"]]

found = []
for name, *args in json.loads(sys.argv[1]):
    try:
        found.append(globals()[name](*args))
    except UserError as error:
        found.append(f"UserError: {error}")
print(json.dumps(found))
"""
HH, OASST, GPT2 = "Anthropic/hh-rlhf", "OpenAssistant/oasst1", "openai-community/gpt2-medium"
DATA_FROM_HUB, MODEL_FROM_HUB = ["data", HH, OASST], ["model", GPT2]


def load(*calls: list[str], home: Path, endpoint: str = NOBODY, offline: bool = False) -> list[Any]:
    """What each call in LOAD returns, or its UserError."""
    home.mkdir(exist_ok=True)
    done = run(["-c", LOAD, json.dumps(calls)], home, endpoint, offline)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_refused(error: Any, start: str) -> None:
    assert str(error).startswith(f"UserError: {start}"), error
    assert "rlhf prepare" in error
    assert "\n" not in error


def test_what_comes_from_the_hub_is_what_is_local_then_also_offline(tmp_path: Path) -> None:
    hh, oasst = make_pairs(tmp_path / "hh-rlhf"), make_messages(tmp_path / "oasst1", messages())
    if (real := DATA / "hh-rlhf/harmless-base.jsonl.gz").exists():
        (hh / "harmless-base/test.jsonl.gz").write_bytes(real.read_bytes())
    gpt2, home = make_policy(tmp_path / "gpt2"), tmp_path / "home"
    here = [["data", str(hh), str(oasst)], ["model", str(gpt2)]]
    *local, data_error, model_error = load(*here, DATA_FROM_HUB, MODEL_FROM_HUB, home=tmp_path / "empty", offline=True)
    assert_refused(data_error, f"{HH}: expected a local path or a hub data set")
    assert str(model_error).startswith(f"UserError: model '{GPT2}': expected a model that transformers can load")
    (pair_counts, prompt_counts, items), (ids, _, labels) = local
    files = [gzip.decompress(path.read_bytes()) for path in (hh / "harmless-base").iterdir()]
    assert pair_counts["rows"] == sum(content.count(b"\n") for content in files)
    assert prompt_counts["messages"] == len(messages())
    assert len(items) == pair_counts["kept"] + prompt_counts["kept"] > 0
    assert (len(ids) > 0, labels) == (True, 1)

    repos = {f"datasets/{HH}": hh, f"datasets/{OASST}": oasst, f"models/{GPT2}": gpt2}
    with HubServer(repos) as server:
        assert load(DATA_FROM_HUB, MODEL_FROM_HUB, home=home, endpoint=server.url) == local
        files_of = [r.split("/resolve/")[1] for r in server.requests if "/datasets/" in r and "/resolve/" in r]
        fetched = {name.split("/", 1)[1] for name in files_of}
    assert fetched == {
        "harmless-base/test.jsonl.gz",
        "harmless-base/train.jsonl.gz",
        "data/train-00000-of-00001.parquet",
        "data/validation-00000-of-00001.parquet",
    }
    *cached, part = load(DATA_FROM_HUB, MODEL_FROM_HUB, ["subsets", HH], home=home, endpoint=server.url, offline=True)
    assert cached == local
    # All four subsets are asked for, one is cached: a quarter of the data must not pass for all of it.
    assert_refused(part, HH)
    # The server is gone but nobody said so: the cache stands in as well.
    assert load(DATA_FROM_HUB, home=home, endpoint=server.url) == local[:1]


def test_all_subsets_by_default_and_never_the_red_team(tmp_path: Path) -> None:
    hh = make_pairs(tmp_path / "hh-rlhf")
    write_gz(hh / "harmless-base/test.jsonl.gz", [pair_row("crafted?")])
    other = tmp_path / "other"  # the rows in two formats, texts beside them, and a split that is not asked for
    (other / "data").mkdir(parents=True)
    rows = [{"q": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(2)]
    for name in ("train_prefs-0", "train_sft-0"):
        Dataset.from_list(rows if "prefs" in name else [{"q": "sft", "x": 1}]).to_parquet(
            other / f"data/{name}.parquet"
        )
    for name in ("data/train_prefs.jsonl", "LICENSE.txt", "dataset_infos.json"):
        (other / name).write_text('"no pair"')
    mapped = ["chosen_files", "our/prefs", "data/train_prefs*", {"prompt": "q"}]
    calls = [["subsets", HH], ["subsets", "Nobody/nothing"], ["subsets", HH, "v9"], mapped]
    with HubServer({f"datasets/{HH}": hh, "datasets/our/prefs": other}) as server:
        found, missing, revision, files = load(*calls, home=tmp_path / "home", endpoint=server.url)
        assert not [request for request in server.requests if "red" in request]
    places = ("test.jsonl.gz:1", "train.jsonl.gz:1", "train.jsonl.gz:2")
    assert found == [[f"{subset}/{place}" for subset in SUBSETS for place in places], 12]
    assert files == [["0?", "1?"], ["0?", "1?"], 2]
    assert_refused(missing, "Nobody/nothing: expected a local path or a hub data set")
    assert_refused(revision, f"{HH}: expected a local path or a hub data set at revision 'v9'")
