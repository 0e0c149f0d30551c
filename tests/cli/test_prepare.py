"""A recipe's models and data are fetched once; then its stages start without a network."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from hub_data import NOBODY, ROOT, SUBSETS, make_judge, make_messages, make_pairs, make_policy, message, run
from hub_server import HubServer

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
