"""Data sets and models as they lie on the hub, and processes that load them from a server or a cache."""

import gzip
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import tiny
import workers

ROOT = Path(__file__).parents[1]
DATA = ROOT / "../shared/data"
SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
NOBODY = "http://127.0.0.1:9"


def run(command: list[str], home: Path, endpoint: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` with its own HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, which the client reads on import."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "1" if offline else "0"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    return workers.python(command, clean | settings, home)


def dialogue(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def write_gz(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def pair_row(question: str) -> dict[str, str]:
    return {"chosen": dialogue(question, "yes"), "rejected": dialogue(question, "no")}


def make_pairs(folder: Path) -> Path:
    """Four folders of pairs, and the red team's."""
    for subset in SUBSETS:
        write_gz(folder / subset / "test.jsonl.gz", [pair_row(f"{subset} test?")])
        write_gz(folder / subset / "train.jsonl.gz", [pair_row(f"{subset} train {number}?") for number in range(2)])
    write_gz(folder / "red-team-attempts/red_team_attempts.jsonl.gz", [{"transcript": dialogue("q", "a")}])
    (folder / "README.md").write_text("# pairs\n")
    return folder


def messages() -> list[dict[str, Any]]:
    """Real ones if they are on this machine."""
    if (real := DATA / "oasst/messages.jsonl.gz").exists():
        return [json.loads(line) for line in gzip.open(real, "rt", encoding="utf-8")]
    return [message("prompter", "One?", 0), message("assistant", "1.", 0), message("prompter", "Zwei?", 1, "de")]


def message(role: str, text: str, tree: int, lang: str = "en") -> dict[str, Any]:
    known = {"message_tree_id": f"t{tree}", "role": role, "lang": lang, "text": text, "deleted": False}
    return {"message_id": f"{role} {text}", **known}


def make_messages(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Two parquet files, and a file of trees that is never read."""
    from datasets import Dataset

    keep = ("message_id", "message_tree_id", "role", "lang", "text", "deleted")
    table = [{name: row[name] for name in keep} for row in rows]
    (folder / "data").mkdir(parents=True)
    for name, part in (("train", table[:-1]), ("validation", table[-1:])):
        Dataset.from_list(part).to_parquet(folder / f"data/{name}-00000-of-00001.parquet")
    write_gz(folder / "2023-04-12_oasst_all.trees.jsonl.gz", [{"not": "to be read"}])
    return folder


def make_policy(folder: Path) -> Path:
    tiny.gpt2().save_pretrained(folder)
    tiny.gpt2_tokenizer().save_pretrained(folder)
    return folder


def make_judge(folder: Path) -> Path:
    tiny.gpt2_reward().save_pretrained(folder)
    tiny.gpt2_tokenizer().save_pretrained(folder)
    return folder
