"""Recipes and flags that say nothing that can be done; no model and no data are looked at for any of them."""

import pytest
from bad_input import Asker, cases

from rlhf.cli import compare, evaluate, pipeline, prepare, rate, report, train_ppo, train_reward

REWARD, PPO, EVALUATION = train_reward.main, train_ppo.main, evaluate.main
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{n}: &{n} [*{p}, *{p}]\n" for p, n in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)

# What is written into the recipe -> words of the answer.
FILES = {
    "empty": (b"", "r.yaml: expected fields with values, found nothing"),
    "only a comment": (b"# margin: 1\n", "r.yaml: expected fields with values, found nothing"),
    "a list": (b"- margin\n", "r.yaml: expected fields with values, found list"),
    "a text": (b"margin\n", "r.yaml: expected fields with values, found str"),
    "a number": (b"5", "r.yaml: expected fields with values, found int"),
    "no yaml": (b"margin: [1, 2\n", "r.yaml: not valid YAML: "),
    "a tab": (b"a:\n\tb: 1\n", "r.yaml: not valid YAML: "),
    "two documents": (b"a: 1\n---\nb: 2\n", "r.yaml: not valid YAML: "),
    "json cut short": (b'{"margin": 1', "r.yaml: not valid YAML: "),
    "binary": (bytes(range(256)), "r.yaml: not valid YAML: "),
    "nul bytes": (b"margin: 1\0\n", "r.yaml: not valid YAML: "),
    "latin-1": (b"run_name: caf\xe9\n", "r.yaml: not valid YAML: "),
    "a python object": (
        b"a: !!python/object/apply:os.system ['true']\n",
        "could not determine a constructor for the tag",
    ),
    "a python name": (b"a: !!python/name:os.system\n", "could not determine a constructor for the tag"),
    "a tag that fails": (b"margin: !!timestamp x\n", "r.yaml: not valid YAML: "),
    "no such day": (b"run_name: 2024-13-45\n", "r.yaml: not valid YAML: "),
    "an int of 5,000 digits": (b"seed: " + b"1" * 5000, "r.yaml: not valid YAML: "),
    "deep": (b"[" * 20_000, "r.yaml: not valid YAML: "),
    "aliases": (LAUGHS.encode(), "r.yaml: not valid YAML: an alias"),
    "an alias of itself": (b"a: &a [*a]\n", "r.yaml: not valid YAML: an alias"),
    "a field twice": (
        b"margin: 1\nseed: 1\nmargin: 2\n",
        "not valid YAML: field 'margin' twice, again in line 3",
    ),
    "huge": (b"# " + b"x" * (2 << 20), "r.yaml: expected at most 1,048,576 bytes; the file is larger"),
    "a number as field": (b"5: 1\n", "field 5: unknown field; --help all lists all fields"),
    "the end of two fields": (b"length: 1\n", "field 'length': unknown field; did you mean 'max_length'?"),
    "a field of no stage": (b"margn: 1\n", "field 'margn': unknown field; did you mean 'margin'?"),
    "a field of ppo": (b"kl_coef: 0.1\n", "field 'kl_coef': unknown field; --help all lists"),
    "a field of the evaluation": (b"eval_temperature: 1\n", "field 'eval_temperature': unknown field; --help"),
    "a recipe in a recipe": (b"config: other.yaml\n", "field 'config': unknown field; --help all lists"),
    "help": (b"help: true\n", "field 'help': unknown field; --help all lists"),
    "words for a number": (b"margin: wide\n", "field 'margin': expected float, found 'wide'"),
    "yes for a number": (b"seed: yes\n", "field 'seed': expected int, found 'True'"),
    "a float for a size": (b"max_examples: 10.0\n", "field 'max_examples': expected int, found '10.0'"),
    "an exponent for a size": (b"max_examples: 1e30\n", "field 'max_examples': expected int, found '1e30'"),
    "a size out of bounds": (b"max_examples: 1" + b"0" * 30, "field 'max_examples': expected a number between ±1e+12"),
    "a number for a switch": (b"bf16: 7\n", "field 'bf16': expected yes or no, found '7'"),
    "several for one": (b"margin: [1, 2]\n", "field 'margin': expected one value, found [1, 2]"),
    "a list of one": (b"margin: [1]\n", "field 'margin': expected one value, found [1]"),
    "none for one": (b"margin: []\n", "field 'margin': expected one value, found []"),
    "fields for a number": (b"margin: {a: 1}\n", "field 'margin': expected float, found '{\"a\": 1}'"),
    "lists in a list": (b"report_to: [[a]]\n", "field 'report_to': expected"),
    "another choice": (
        b"loss_type: hinge\n",
        "field 'loss_type': expected one of margin, bradley_terry, found 'hinge'",
    ),
    "nan": (b"learning_rate: .nan\n", "field 'learning_rate': expected a number between ±1e+12, found 'nan'"),
    "infinity": (b"margin: .inf\n", "field 'margin': expected a number between ±1e+12, found 'inf'"),
    "minus infinity": (b"learning_rate: -.inf\n", "field 'learning_rate': expected a number between"),
    "1e400": (b"learning_rate: 1e400\n", "field 'learning_rate': expected a number between ±1e+12, found '1e400'"),
}


@pytest.fixture
def ask(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Asker(tmp_path, capsys, monkeypatch)


@cases(FILES)
def test_recipe_files(ask, tmp_path, given, words):
    (tmp_path / "r.yaml").write_bytes(given)
    ask(REWARD, "--config", "r.yaml", words=["recipe r.yaml: ", words])


PATHS = {
    "missing": ("no.yaml", "recipe no.yaml: cannot read it: No such file or directory"),
    "a folder": (".", "recipe .: cannot read it: Is a directory"),
    "a file as folder": ("file/r.yaml", "recipe file/r.yaml: cannot read it: Not a directory"),
    "too long": ("x" * 5000, "cannot read it: File name too long"),
    "no name": ("", "recipe .: cannot read it: Is a directory"),
    "endless": ("/dev/zero", "recipe /dev/zero: expected at most 1,048,576 bytes; the file is larger"),
}


@cases(PATHS)
@pytest.mark.parametrize("main", [REWARD, PPO], ids=["reward", "ppo"])
def test_recipe_paths(ask, tmp_path, main, given, words):
    (tmp_path / "file").write_text("")
    ask(main, "--config", given, words=words)
    ask(main, f"--config={given}", words=words)


# (script, flags) -> words of the answer
FLAGS = {
    "two recipes": ((REWARD, "--config", "a", "--config", "b"), "--config: give one recipe, not 2"),
    "no recipe": ((REWARD, "--config"), "--config: expected a recipe's file after it"),
    "an unknown flag": ((PPO, "--nonsense", "1"), "command line: unknown field '--nonsense'"),
    "a short flag": ((PPO, "--learning", "1"), "unknown field '--learning'"),
    "a word": ((EVALUATION, "study"), "command line: unknown field 'study'"),
    "a flag without value": (
        (PPO, "--learning_rate"),
        "--learning_rate: expected a value after it",
    ),
    "words for a number": ((PPO, "--learning_rate", "fast"), "--learning_rate: expected float, found 'fast'"),
    "nan": ((PPO, "--learning_rate", "nan"), "--learning_rate: expected a number between ±1e+12, found 'nan'"),
    "infinity": ((PPO, "--temperature", "inf"), "--temperature: expected a number between ±1e+12, found 'inf'"),
    "a size of 1e30": ((PPO, "--response_length", "1e30"), "--response_length: expected int, found '1e30'"),
    "a size out of bounds": (
        (PPO, "--response_length", "9" * 20),
        "--response_length: expected a number between ±1e+12",
    ),
    "a batch that never ends": (
        (PPO, "--per_device_train_batch_size", "999999999999", "--num_mini_batches", "4"),
        "num_mini_batches: expected a divisor of",
    ),
    "batches that do not divide": (
        (PPO, "--per_device_train_batch_size", "6", "--num_mini_batches", "4"),
        "= 6, such as 3 or 6, found 4",
    ),
    "no batch": (
        (PPO, "--per_device_train_batch_size", "0"),
        "per_device_train_batch_size: expected at least 1, found 0",
    ),
    "no epochs": ((PPO, "--num_ppo_epochs", "0"), "num_ppo_epochs: expected at least 1, found 0"),
    "no temperature": ((PPO, "--temperature", "0"), "temperature: expected a positive number, found 0.0"),
    "a negative coefficient": ((PPO, "--kl_coef", "-1"), "kl_coef: expected 0 or more, found -1.0"),
    "a negative rate": ((PPO, "--learning_rate=-1e-5"), "learning_rate: expected 0 or more, found -1e-05"),
    "a discount of 2": ((PPO, "--gamma", "2"), "gamma: expected a number from 0 to 1, found 2.0"),
    "a beta of 1": ((PPO, "--adam_beta1", "1"), "adam_beta1: expected a number from 0 to below 1, found 1.0"),
    "negative decay": ((PPO, "--weight_decay", "-1"), "weight_decay: expected at least 0, found -1.0"),
    "a negative epsilon": ((PPO, "--adam_epsilon", "-1"), "adam_epsilon: expected at least 0, found -1.0"),
    "no training epochs": ((PPO, "--num_train_epochs", "0"), "num_train_epochs: expected a positive number, found 0.0"),
    "negative steps": ((PPO, "--max_steps", "-7"), "max_steps: expected at least 1, or -1 for none, found -7"),
    "no steps": ((PPO, "--max_steps", "0"), "max_steps: expected at least 1, or -1 for none, found 0"),
    "a negative seed": ((PPO, "--seed", "-1"), "seed: expected a number from 0 to 4294967295, found -1"),
    "a seed too large": ((PPO, "--seed", "4294967296"), "seed: expected a number from 0 to 4294967295"),
    "never logged": ((PPO, "--logging_steps", "0"), "logging_steps: expected a positive number, found 0.0"),
    "never saved": ((PPO, "--save_steps", "0"), "save_steps: expected a positive number, found 0.0"),
    "no checkpoint kept": ((PPO, "--save_total_limit", "0"), "save_total_limit: expected at least 1, found 0"),
    "another schedule": ((PPO, "--lr_scheduler_type", "magic"), "'magic'"),
    "another optimizer": ((PPO, "--optim", "magic"), "'magic'"),
    "a schedule's options": (
        (PPO, "--lr_scheduler_kwargs", "{a: 1}"),
        "command line: invalid values",
    ),
    "another tracker": ((PPO, "--report_to", "paper"), "report_to: expected none, all, or a list of"),
    "no prompts": ((PPO, "--train_prompts", "0"), "train_prompts: expected at least 1, found 0"),
    "prompts of no token": ((PPO, "--max_prompt_length", "0"), "max_prompt_length: expected at least 1, found 0"),
    "no evaluation": ((PPO, "--evaluation_prompts", "0"), "evaluation_prompts: expected at least 1, found 0"),
    "negative ratings": ((PPO, "--rating_prompts", "-1"), "rating_prompts: expected at least 0, found -1"),
    "an adapter of rank 0": ((PPO, "--use_peft", "true", "--lora_r", "0"), "lora_r: expected at least 1, found 0"),
    "an adapter's dropout": (
        (PPO, "--use_peft", "true", "--lora_dropout", "1"),
        "lora_dropout: expected a number from 0 to below 1, found 1.0",
    ),
    "an adapter's field alone": ((PPO, "--lora_r", "4"), "lora_r: expected 16, found 4"),
    "a field of TRL's trainer": ((PPO, "--sft_model_path", "x"), "sft_model_path: use model_name_or_path instead"),
    "no model": ((PPO,), "model_name_or_path: set it in the recipe or by --model_name_or_path"),
    "no base of a reward model": ((REWARD,), "model_name_or_path: set it in the recipe"),
    "4 bits without adapters": ((REWARD, "--load_in_4bit", "true"), "uses it only with use_peft true"),
    "no pairs": ((REWARD, "--max_examples", "0"), "max_examples: expected at least 1, found 0"),
    "negative validation": ((REWARD, "--validation_examples", "-5"), "validation_examples: expected at least 1"),
    "no test": ((REWARD, "--test_examples", "0"), "test_examples: expected at least 1, found 0"),
    "no margin": ((REWARD, "--margin", "0"), "margin: expected a positive number, found 0.0"),
    "pairs of a token": ((REWARD, "--max_length", "1"), "max_length: expected at least 2 tokens, found 1"),
    "a reward batch of 0": ((REWARD, "--per_device_eval_batch_size", "0"), "eval_batch_size: expected at least 1"),
    "a reward rate": ((REWARD, "--learning_rate", "-1"), "learning_rate: expected at least 0, found -1.0"),
    "a reward seed": ((REWARD, "--seed", "-1"), "seed: expected a number from 0 to 4294967295, found -1"),
    "reward epochs": ((REWARD, "--num_train_epochs", "-1"), "num_train_epochs: expected a positive number, found -1.0"),
    "another evaluation": (
        (REWARD, "--eval_strategy", "never"),
        "invalid values: never is not",
    ),
    "a confidence of 1": (
        (EVALUATION, "--confidence", "1"),
        "confidence: expected a number between 0 and 1, found 1.0",
    ),
    "an evaluation batch of 0": ((EVALUATION, "--eval_batch_size", "0"), "eval_batch_size: expected at least 1"),
    "no response": ((EVALUATION, "--eval_response_length", "0"), "eval_response_length: expected at least 1, found 0"),
    "a cold evaluation": ((EVALUATION, "--eval_temperature", "0"), "eval_temperature: expected a positive number"),
    "an evaluation seed": ((EVALUATION, "--eval_seed", "-1"), "eval_seed: expected a number from 0 to 4294967295"),
    "no run to evaluate": (
        (EVALUATION, "--run", "none"),
        "runs/none/reward: expected a stage that is done, found: not",
    ),
    "no run to train in": (
        (PPO, "--run", "none", "--model_name_or_path", "x"),
        "runs/none/reward: expected a stage that is done, found: not run; run that stage first",
    ),
    "no run to compare": ((compare.main, "--run", "none"), "runs/none/evaluation: expected a stage that is done"),
    "no run to report": ((report.main, "--run", "none"), "runs/none: not a run folder: it has none of reward"),
    "no arguments": ((report.main,), "runs/default: not a run folder: it has none of reward"),
    "no runs to report": ((report.main, "--run", "all", "--runs", "a", "b"), "runs/a"),
    "a report of runs without a name": ((report.main, "--runs", "a", "b"), "run: give --run a name for the folder"),
    "a run elsewhere to report": ((report.main, "--run", "x", "--runs", "../y"), "runs: expected a plain folder name"),
    "no action": ((rate.main,), "rate: give one of sheet, serve, import first, not ''"),
    "another action": ((rate.main, "sheets"), "rate: give one of sheet, serve, import first, not 'sheets'"),
    "an action's flag": ((rate.main, "sheet", "--nonsense"), "unknown field '--nonsense'"),
    "a sheet of no run": ((rate.main, "sheet", "--run", "none"), "runs/none/evaluation: expected a stage that is done"),
    "ratings of no run": ((rate.main, "import", "--run", "none"), "runs/none/ratings/key.json: expected a JSON file"),
    "a page of no run": ((rate.main, "serve", "--run", "none"), "runs/none/ratings/key.json: expected a JSON file"),
    "a port": ((rate.main, "serve", "--port", "70000"), "port: expected 0 to 65535, found 70000"),
    "a port in words": ((rate.main, "serve", "--port", "http"), "--port: expected int, found 'http'"),
    "negative repeats": (
        (rate.main, "sheet", "--rating_repeats", "-1"),
        "rating_repeats: expected at least 0, found -1",
    ),
    "a rating's confidence": ((rate.main, "import", "--rating_confidence", "nan"), "expected a number between"),
    "an unknown recipe": ((pipeline.main, "--recipe", "none"), "recipe: expected one of demo, gpt2-medium, smollm2"),
    "an unknown engine": ((pipeline.main, "--engine", "warp"), "engine: expected one of cpu"),
    "an unknown executor": (
        (pipeline.main, "--executor", "cloud"),
        "--executor: expected one of local, slurm, found 'cloud'",
    ),
    "sbatch without slurm": ((pipeline.main, "--sbatch=--nodes=2"), "sbatch: add --executor slurm"),
    "seeds without a run's name": ((pipeline.main, "--seeds", "1,2"), "run: give --run a name for these runs"),
    "seeds that are no numbers": ((pipeline.main, "--seeds", "1,x"), "seeds: expected numbers like 1,2,3 or 1-3"),
    "seeds backwards": ((pipeline.main, "--seeds", "3-1"), "seeds: expected numbers like 1,2,3 or 1-3"),
    "a seed twice": ((pipeline.main, "--seeds", "1,2,1"), "seeds: expected different seeds"),
    "seed and seeds": ((pipeline.main, "--seed", "1", "--seeds", "1,2"), "seed, seeds: give one of them, not both"),
    "an unknown recipe to prepare": ((prepare.main, "--recipe", "none"), "recipe: expected one of demo, gpt2-medium"),
    "a recipe of no name": ((prepare.main, "--recipe", ""), "recipe: expected one of demo, gpt2-medium"),
    "a recipe's name too long": ((prepare.main, "--recipe", "x" * 5000), "recipe: expected one of demo, gpt2-medium"),
    "a prepare's flag": ((prepare.main, "--all"), "unknown field '--all'"),
}


@cases(FLAGS)
def test_flags(ask, monkeypatch, given, words):
    main, *flags = given
    ask(main, *flags, words=words)


RUNS = {
    "nothing": ("", "run: expected a plain folder name, found ''"),
    "here": (".", "run: expected a plain folder name, found '.'"),
    "above": ("..", "run: expected a plain folder name, found '..'"),
    "beside": ("../other", "run: expected a plain folder name, found '../other'"),
    "below": ("a/b", "run: expected a plain folder name, found 'a/b'"),
    "elsewhere": ("/tmp/x", "run: expected a plain folder name, found '/tmp/x'"),
    "a slash": ("x/", "run: expected a plain folder name, found 'x/'"),
    "two lines": ("a\nb", "run: expected a plain folder name, found 'a\\nb'"),
    "an escape": ("a\x1b[2J", "run: expected a plain folder name, found 'a\\x1b[2J'"),
    "too long": ("x" * 300, "run: expected a plain folder name, found 'xxx"),
}


@cases(RUNS)
@pytest.mark.parametrize(
    "main",
    [REWARD, PPO, EVALUATION, report.main, compare.main, pipeline.main],
    ids=["reward", "ppo", "evaluation", "report", "compare", "pipeline"],
)
def test_run_names(ask, main, given, words):
    ask(main, f"--run={given}", words=words)


PREPARED = {
    "no yaml": ("reward", "a: b: c", "reward.yaml: not valid YAML: "),
    "a number as model": (
        "reward",
        "model_name_or_path: 5",
        "reward: field 'model_name_or_path': expected a name, found 5",
    ),
    "models": (
        "ppo_full",
        "model_name_or_path: [a, b]",
        "ppo_full: field 'model_name_or_path': expected a name, found ['a",
    ),
    "a number as judge": (
        "ppo_full",
        "reward_model_path: 1.5",
        "field 'reward_model_path': expected a name, found 1.5",
    ),
    "no such model": ("evaluation", "base_model: ./nowhere", "model './nowhere': expected a model folder, a hub id or"),
    "no such pairs": ("reward", "dataset_name: ./p.jsonl", "./p.jsonl: expected a file, a folder or a hub id"),
    "a size": ("reward", "max_examples: many", "recipe for reward: field 'max_examples': expected int, found 'many'"),
}


@pytest.mark.parametrize(("stage", "content", "words"), PREPARED.values(), ids=PREPARED)
def test_recipes_to_prepare(ask, tmp_path, stage, content, words):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / f"{stage}.yaml").write_text(content)
    ask(prepare.main, "--recipe", tmp_path / "recipes", words=words)


def test_a_value_may_begin_with_a_dash(ask, tmp_path, capsys):
    """And is no flag: this one would have the run say what it takes, and end."""
    (tmp_path / "r.yaml").write_text("run_name: --dry_run\nlearning_rate: -1e-5\n")
    ask(REWARD, "--config", "r.yaml", words="learning_rate: expected at least 0, found -1e-05")


@pytest.mark.parametrize("content", ['{"status": "done"}', '{"status": "done", "config": [1]}'])
def test_an_evaluation_without_settings(ask, tmp_path, content):
    folder = tmp_path / "runs" / "x" / "evaluation"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(content)
    ask(
        compare.main,
        "--run",
        "x",
        words="evaluation/run.json: has no settings of an evaluation; run the evaluation again",
    )
