"""A run whose rewards are functions that its recipe names; its evaluation goes on after interruptions."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from test_model_options import answer, run_folder  # noqa: F401

from rlhf.cli import compare, evaluate, report, train_ppo
from rlhf.cli.parsing import parse
from rlhf.evaluation import generate as generating
from rlhf.reward.named import named_rewards
from rlhf.storage.stages import read_run

ROOT = Path(__file__).parents[2]
REWARDS = """
def right(completions, answer, **_):
    return [float(want in said[0]["content"]) for said, want in zip(completions, answer)]

def length(completion_ids, trainer_state):
    return [len(ids) / 6 for ids in completion_ids]
"""


@pytest.fixture
def recipes(run_folder):  # noqa: F811
    """A run without a reward model, its prompts and functions; returns both recipes."""
    shutil.rmtree(run_folder / "runs")
    (run_folder / "answers.py").write_text(REWARDS)
    rows = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(20)]
    (run_folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = yaml.safe_load((run_folder / "ppo.yaml").read_text())
    shared = {"prompt_dataset": [str(run_folder / "sums.jsonl")], "reward_weights": [1.0, 0.5]}
    shared |= {"rewards": [f"{run_folder / 'answers.py'}:right", f"{run_folder / 'answers.py'}:length"]}
    names = ("run", "runs_dir", "train_prompts", "evaluation_prompts", "rating_prompts", "max_prompt_length")
    shared |= {name: settings[name] for name in names}
    base = settings["model_name_or_path"]
    evaluation = {"base_model": base, "eval_response_length": 6, "eval_batch_size": 2}
    for name, fields in (("ppo", settings | shared), ("evaluation", shared | evaluation)):
        (run_folder / f"{name}.yaml").write_text(yaml.safe_dump(fields))
    return run_folder


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_functions_train_and_evaluate_without_a_reward_model(recipes, monkeypatch, capsys):
    def ask(command, *argv):
        return answer(command.main, monkeypatch, capsys, *argv)

    ppo, evaluation = (["--config", recipes / f"{name}.yaml"] for name in ("ppo", "evaluation"))
    run = ["--run", "tiny", "--runs_dir", recipes / "runs"]
    code, said, errors = ask(train_ppo, *ppo, "--dry_run", "yes")
    assert (code, errors) == (0, []), said
    assert "reward" not in said
    code, said, errors = ask(train_ppo, *ppo)
    assert (code, errors) == (0, []), said
    folder = recipes / "runs" / "tiny" / "evaluation"
    for row in rows_of(folder.parent / "ppo_full" / "metrics.jsonl"):
        assert row["objective/scores"] == pytest.approx(row["rewards/right/mean"] + 0.5 * row["rewards/length/mean"])

    whole, calls = generating.generate, []

    def cut(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(generating, "generate", cut)
    assert ask(evaluate, *evaluation)[0] == 130
    assert read_run(folder)["status"] == "stopped"
    first = rows_of(folder / "answered.jsonl")
    assert len(first) == 4  # two batches
    with (folder / "answered.jsonl").open("a") as file:
        file.write('{"half of a ro')
    monkeypatch.setattr(evaluate, "summarise", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(evaluate, *evaluation)
    assert len(calls) == 3 + 2 * 6 - 2  # of 7 and 3 prompts, by two models, in twos, less those that are there
    assert read_run(folder)["status"] == "failed"
    assert rows_of(folder / "answered.jsonl")[:4] == first
    monkeypatch.undo()
    monkeypatch.setattr(generating, "generate", None)  # nothing is left to be answered
    code, said, errors = ask(evaluate, *evaluation)
    assert (code, errors) == (0, []), said
    assert not (folder / "answered.jsonl").exists()
    monkeypatch.undo()

    kept = [(folder / name).read_text() for name in ("responses.jsonl", "rating_responses.jsonl", "evaluation.json")]
    shutil.rmtree(folder)
    assert ask(evaluate, *evaluation)[0] == 0
    uncut = [(folder / name).read_text() for name in ("responses.jsonl", "rating_responses.jsonl", "evaluation.json")]
    assert uncut == kept
    wanted = {row["prompt"]: row["answer"] for row in rows_of(recipes / "sums.jsonl")}
    for row in rows_of(folder / "responses.jsonl"):
        right = float(wanted[row["prompt"]] in row["response"])
        assert row["score"] == pytest.approx(right + 0.5 * row["response_length"] / 6)
    assert "`" + f"{recipes / 'answers.py'}:right" in (folder.parent / "ppo_full" / "README.md").read_text()
    code, said, errors = ask(report, *run)
    assert (code, errors) == (0, []), said
    code, _, errors = ask(compare, *run, "--prompt", "hello")
    assert code == 2
    assert "was scored by functions" in errors[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("right", "rewards: expected module:function or file.py:function, found 'right'"),
        ("no_such_module:right", "rewards: there is no module 'no_such_module', neither installed nor in "),
        ("no_such.py:right", "rewards: there is no file "),
        ("math:pi", "rewards: math: expected a function 'pi', found float"),
        ("math:sqr", "rewards: math: expected a function 'sqr', found nothing of this name; did you mean 'sqrt'?"),
        ("answers:right", None),
        ("broken:right", "rewards: broken: it cannot be imported: ModuleNotFoundError: No module named 'also_missing'"),
        ("./broken.py:right", "rewards: ./broken.py: it cannot be imported: ModuleNotFoundError"),
        ("package.inner:right", None),
        ("package.missing:right", "rewards: package.missing: it cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_function_is_found_or_said_to_be_missing(recipes, monkeypatch, capsys, name, words):
    (recipes / "broken.py").write_text("import also_missing\n")
    (recipes / "package").mkdir()
    (recipes / "package" / "inner.py").write_text(REWARDS)
    monkeypatch.chdir(recipes)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.modules", dict(sys.modules))
    argv = ["--config", recipes / "ppo.yaml", "--rewards", name, "--reward_weights", "1", "--dry_run", "yes"]
    code, said, errors = answer(train_ppo.main, monkeypatch, capsys, *argv)
    assert code == (2 if words else 0), said
    assert errors == [] if words is None else errors[0].startswith(f"error: {words}"), errors


def test_gsm8ks_reward_and_recipes():
    folder = ROOT / "examples" / "gsm8k"
    [right] = named_rewards([f"{folder / 'rewards.py'}:right"])
    said = ["72", "so it is #### 72", "#### 1,072.0 apples", "#### 7 #### 72.", "####", "#### -72"]
    completions = [[{"role": "assistant", "content": text}] for text in said]
    assert right(completions, ["2 * 36 = 72\n#### 72"] * 6) == [0, 1, 0, 1, 0, 0]
    assert right(completions, ["#### 1,072"] * 6) == [0, 0, 1, 0, 0, 0]
    _, data, _, args = parse(train_ppo.KINDS, ["--config", str(folder / "ppo_full.yaml"), "--bf16", "no", "--use_cpu"])
    _, again, config = parse(evaluate.KINDS, ["--config", str(folder / "evaluation.yaml")])
    assert data == again
    assert args.rewards == config.rewards == ["examples/gsm8k/rewards.py:right"]


def test_one_sentences_reward_and_recipes(tmp_path, monkeypatch):
    folder = ROOT / "examples" / "one_sentence"
    [obeys] = named_rewards([f"{folder / 'rewards.py'}:obeys"])
    said = [
        "The sea is blue.",
        " Blue! ",
        "The sea is blue",
        "It is bluer.",
        "Blue. And wide.",
        "A blue 3.5 mile sea?",
        "",
        "Is it blue? it",
    ]
    completions = [[{"role": "assistant", "content": text}] for text in said]
    assert obeys(completions, ["blue"] * 8) == [1, 1, 0, 0, 0, 1, 0, 0]
    assert obeys(completions[:2], ["sea", "sea"]) == [1, 0]
    _, data, _, args = parse(train_ppo.KINDS, ["--config", str(folder / "ppo_lora.yaml"), "--bf16", "no", "--use_cpu"])
    _, again, config = parse(evaluate.KINDS, ["--config", str(folder / "evaluation.yaml")])
    assert data == again
    assert args.rewards == config.rewards == ["examples/one_sentence/rewards.py:obeys"]
    assert (args.temperature, args.response_length) == (config.eval_temperature, config.eval_response_length)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(folder / "data.py"), run_name="__main__")
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == data.train_prompts + data.evaluation_prompts
    assert all(f'"{row["word"]}"' in row["prompt"] for row in rows)


@pytest.mark.parametrize("place", ["here:where", "folder/here.py:where"])
def test_a_file_beside_a_users_module_hides_nothing_of_ours(tmp_path, monkeypatch, place):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("colorsys", "beside", "here"):  # not imported yet, and forgotten afterwards
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "colorsys.py").write_text("HERE = True\n")
    (folder / "beside.py").write_text("HERE = True\n")
    (folder / "here.py").write_text("import beside, colorsys\n\ndef where():\n    return beside.HERE, colorsys\n")
    monkeypatch.chdir(tmp_path if "/" in place else folder)
    found, colors = named_rewards([place])[0]()
    assert found
    assert not hasattr(colors, "HERE")
