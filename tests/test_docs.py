"""What the documentation says is so: links, command lines, flags, files, metrics and Python blocks."""

import argparse
import ast
import importlib
import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import is_typeddict

import pytest
import tiny
import tiny_ppo
import transformers
import yaml
from accelerate.commands.launch import launch_command_parser
from test_architecture import FLOORS

from rlhf import file_types
from rlhf.cli.__main__ import COMMANDS as RLHF
from rlhf.config import RewardStageConfig
from rlhf.data.hh_rlhf import load_pairs
from rlhf.reward.trainer import encode_pairs, train_reward_model

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}


# --- What a page holds ------------------------------------------------------------------------------------------


def blocks(text):
    """(language, lines) of each block of code: fenced, or indented ("") after an empty line outside of a list."""
    found, fence, indented = [], None, None
    before, in_list = "", False
    for line in text.splitlines():
        if fence is not None:
            if line.startswith("```"):
                found.append(fence)
                fence = None
            else:
                fence[1].append(line)
            continue
        if indented is None and line.startswith("    ") and not before.strip() and not in_list:
            indented = ("", [])
        if indented is not None and (line.startswith("    ") or not line.strip()):
            indented[1].append(line[4:])
        else:
            found += [] if indented is None else [indented]
            indented = None
            if line.startswith("```"):
                fence = (line.strip("`").strip(), [])
            elif line.strip():
                in_list = bool(re.match(r"([*-]|\d+\.) |  ", line))
        before = line
    return found if indented is None else [*found, indented]


def prose(text):
    """The page without its blocks of code."""
    return re.sub(r"^    .*$", "", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M)


def inline_code(text):
    return re.findall(r"`([^`\n]+)`", prose(text))


def anchor(heading):
    """As GitHub makes it."""
    plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")


def headings(text):
    return {anchor(line.lstrip("#")) for line in prose(text).splitlines() if re.match(r"#+ ", line)}


STARTS = r"(?:[A-Z_]+=\S+ )*"
STARTS += r"(?:(?:python3?|rlhf|bash|pip|sbatch|slurm/\S+|tensorboard|ssh|source|export|ruff) |accelerate launch -)"


def commands(text):
    """Command lines of the page: in blocks, in `code`, with continued lines joined and comments taken off."""
    lines = [
        line
        for language, block in blocks(text)
        if language != "python"
        for line in "\n".join(block).replace("\\\n", " ").splitlines()
    ]
    lines += inline_code(text)
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if re.match(STARTS, line)]


def test_the_pages_are_read():
    """The checks below look at something: a page that is read wrongly would pass them all."""
    assert sum(len(commands(text)) for text in TEXTS.values()) > 50
    assert sum(len(re.findall(r"\]\([^)]+\)", prose(text))) for text in TEXTS.values()) > 50
    assert [kind for kind, _ in blocks(TEXTS["docs/trainer.md"])].count("python") > 4
    assert blocks("a\n\n    b\n\n```python\nc\n```\n* d\n\n    no block\n") == [("", ["b", ""]), ("python", ["c"])]


# --- Pages ------------------------------------------------------------------------------------------------------


def test_the_readme_is_a_landing_page():
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[name])):
        if re.match(r"https?:", target):
            continue
        path, _, place = target.partition("#")
        page = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert page.exists(), f"{name}: {target}"
        if place:
            assert place in headings(page.read_text(encoding="utf-8")), f"{name}: {target}"


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("docs/") and n != "docs/trl-defects.md"])
def test_a_page_begins_with_what_it_is_for_and_a_command(name):
    text = TEXTS[name]
    first = re.split(r"^## ", text, flags=re.MULTILINE)[0]
    assert first.startswith("# ")
    assert len(first.split("\n\n")[1].split()) >= 5, "no sentence below the title"
    assert commands(first), "no command before the first section"


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("docs/") and n.count("/") == 1])
def test_the_readme_links_every_page(name):
    assert f"({name})" in TEXTS["README.md"] or any(
        f"({name.removeprefix('docs/')})" in TEXTS[other] for other in NAMES if other.startswith("docs/")
    )


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_in_plain_english(name):
    """Words that a native speaker would not use here; CONTRIBUTING.md asks for plain ones."""
    dialect = r"\b(anew|lest|can be had|goes on|gone on|one's own|nobody who|such as are|filler|mended)\b"
    assert re.findall(dialect, TEXTS[name]) == []


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_are_there(name):
    made = ("runs/", "checkpoints/", ".venv", "out", "tests.xml")  # by a run
    for word in inline_code(TEXTS[name]):
        if re.fullmatch(r"(rlhf|tests|scripts|slurm|docs|examples|accelerate_configs|\.github)/[\w./-]*", word):
            assert word.startswith(made) or (ROOT / word).exists(), f"{name}: {word}"
        elif re.fullmatch(r"(\w+/)+\w+\.py", word):
            assert (TESTS / word).exists() or (ROOT / "rlhf" / word).exists(), f"{name}: {word}"


def test_every_file_is_listed_by_its_first_line():
    text = TEXTS["docs/files.md"]
    found = []
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        room, _, rest = part.partition("\n")
        found += [(f"{room}/{name}", line) for name, line in re.findall(r"^\* `([^`]+)`: (.*)$", rest, re.MULTILINE)]
    files = sorted(path for path in (ROOT / "rlhf").rglob("*.py") if path.name != "__init__.py")
    firsts = [ast.get_docstring(ast.parse(path.read_text())).splitlines()[0] for path in files]
    assert found == [(str(path.relative_to(ROOT)), line) for path, line in zip(files, firsts, strict=True)]


def test_the_readme_shows_every_folder():
    tree = TEXTS["README.md"].split("## Folders")[1]
    rooms = {path.parent.name for path in (ROOT / "rlhf").glob("*/__init__.py")} | {"recipes"}
    named = set(re.findall(r"(\w+)/", tree))
    assert rooms - named == set()
    assert [
        name for name in named if not any((ROOT / base / name).is_dir() for base in (".", "rlhf", "rlhf/models"))
    ] == []


def test_the_floors_are_those_of_the_imports():
    rows = re.findall(r"^\| (\d+) \| (`.*) \|$", TEXTS["docs/architecture.md"], re.M)
    named = {int(number): set(re.findall(r"`(\w+)`", rooms)) for number, rooms in rows}
    assert [named[number] for number in sorted(named)] == FLOORS


def test_the_architecture_names_what_is_in_the_code():
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "rlhf").rglob("*.py"))
    rooms = set().union(*FLOORS)
    for name in inline_code(TEXTS["docs/architecture.md"]):
        if re.fullmatch(r"\w+", name) and name not in rooms:
            assert re.search(rf"\b{name}\b", code), name


# --- Command lines ----------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """A command line was read; nothing is run."""


PLACES = {  # what stands for something else -> one of its values
    "ENGINE": "zero2",
    "SCRIPT": "train_ppo",
    "STAGE": "ppo_full",
    "RECIPE": "demo",
    "N": "2",
    "NAME": "study",
}
SBATCH = {"account", "partition", "nodes", "gres", "time", "signal", "gpus-per-node", "cpus-per-task", "export"}
PYTEST = {"-q", "-x", "-m", "-n", "-k", "--dist", "--durations"}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder from which the repository's files are found, and nothing is written into it."""
    for name in ("rlhf", "accelerate_configs", "scripts", "slurm", "tests", "examples", "docs", ".ci"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "constraints.txt").symlink_to(ROOT / "constraints.txt")
    (tmp_path / "TRL112" / "trl" / "experimental" / "ppo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_script(module_name, argv, monkeypatch):
    """The command's own parser reads its flags, in this process, and stops there."""
    module = importlib.import_module(f"rlhf.cli.{module_name}")
    place, name = (module, "parse") if hasattr(module, "parse") else (argparse.ArgumentParser, "parse_args")
    read = getattr(place, name)

    def only_parse(*args, **options):
        read(*args, **options)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(place, name, only_parse)
        patch.setattr(sys, "argv", [f"{module_name}.py", *argv])
        with pytest.raises(Parsed):
            module.main()


def check_example(path, argv, monkeypatch):
    """An example's parser reads its flags."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def stop(read):
        def only_parse(self, *args, **options):
            read(self, *args, **options)
            raise Parsed

        return only_parse

    with monkeypatch.context() as patch:
        for kind, name in (
            (transformers.HfArgumentParser, "parse_args_into_dataclasses"),
            (argparse.ArgumentParser, "parse_args"),
        ):
            patch.setattr(kind, name, stop(getattr(kind, name)))
        with pytest.raises(Parsed):
            example.main(argv)


def check_python(argv, monkeypatch):
    """python ARGV: a module, a script of ours, or an example."""
    if argv[0] == "-m":
        assert argv[1] in ("pytest", "venv"), argv
        if argv[1] == "pytest":
            check_pytest(argv[2:])
        return
    path = ROOT / argv[0]
    assert path.is_file(), argv[0]
    if argv[0].startswith("scripts/"):
        check_script(path.stem, argv[1:], monkeypatch)
    elif argv[0].startswith("examples/"):
        check_example(path, argv[1:], monkeypatch)
    else:  # tools of the tests: their flags stand in their text
        for flag in argv[1:]:
            assert f'"{flag}"' in path.read_text(), f"{argv[0]} {flag}"


def check_pytest(argv):
    for before, word in zip(["", *argv], argv, strict=False):
        if word.startswith("-"):
            assert word.partition("=")[0] in PYTEST, word
        elif not before.startswith("-") or before in ("-q", "-x"):
            assert (ROOT / word).exists(), word


def check_slurm(argv):
    """slurm/pipeline.sh reads three flags of its own, and sbatch the others."""
    script = ROOT / argv[0]
    assert script.is_file(), argv[0]
    for word in argv[1:]:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            assert name in SBATCH or f"--{name})" in script.read_text(), word


def check_shell(argv, monkeypatch):
    """bash SCRIPT ARGS."""
    assert (ROOT / argv[0]).is_file(), argv[0]
    passed_on = {"scripts/gpu_check.sh": "gpu_check", "scripts/quickstart.sh": "pipeline"}
    if argv[0] in passed_on:
        check_script(passed_on[argv[0]], argv[1:], monkeypatch)


def check_pip(argv):
    text = (ROOT / "pyproject.toml").read_text()
    for word in argv:
        if extras := re.fullmatch(r"\.\[(\w+)\]", word):
            assert f"\n{extras[1]} = [" in text, word


def check(line, monkeypatch):
    """One command line; several joined by && are several."""
    words = shlex.split(line)
    for start in [i for i, word in enumerate(words) if word == "&&"][::-1]:
        check(shlex.join(words[start + 1 :]), monkeypatch)
        words = words[:start]
    words = [PLACES.get(word, word) for word in words]
    words = [re.sub(r"\b(ENGINE|SCRIPT|STAGE)\b", lambda m: PLACES[m[0]], word) for word in words]
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, argv = words[0], words[1:]
    if program in ("python", "python3"):
        check_python(argv, monkeypatch)
    elif program == "rlhf":
        assert argv[0] in {"--help", *RLHF}, line
        if len(argv) > 1 and argv[1:] not in (["--help"], ["--help", "all"]):
            check_script(RLHF[argv[0]].module, argv[1:], monkeypatch)
    elif program == "bash":
        check_shell(argv, monkeypatch)
    elif program == "accelerate":
        assert argv[0] == "launch", line
        args = launch_command_parser().parse_args(argv[1:])
        assert Path(args.config_file).is_file(), args.config_file
        check_python([args.training_script, *args.training_script_args], monkeypatch)
    elif program == "sbatch" or program.startswith("slurm/"):
        at = next(i for i, word in enumerate(words) if word.startswith("slurm/"))
        assert all(word.startswith("--") and word[2:].partition("=")[0] in SBATCH for word in words[1:at])
        check_slurm(words[at:])
    elif program == "pip":
        check_pip(argv)
    else:
        assert program in ("tensorboard", "ssh", "source", "export", "ruff", "mypy"), line


@pytest.mark.parametrize("name", [name for name in NAMES if commands(TEXTS[name])])
def test_command_lines_can_be_called(name, workplace, monkeypatch):
    for line in commands(TEXTS[name]):
        try:
            check(line, monkeypatch)
        except BaseException as error:
            raise AssertionError(f"{name}: {line}\n{type(error).__name__}: {error}") from error


@pytest.mark.parametrize(
    "line", ["python scripts/report.py --rnu demo", "bash scripts/nothing.sh", "pip install .[nix]"]
)
def test_a_wrong_command_line_is_found(line, workplace, monkeypatch):
    with pytest.raises(BaseException):  # noqa: B017, PT011
        check(line, monkeypatch)


@pytest.fixture(scope="module")
def known_flags():
    """Every --flag of every command, of pytest, of accelerate launch and of the shell scripts."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("slurm/*"), *ROOT.glob("scripts/*.sh")])
    code += "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/cuda/*.py"))
    found = set(re.findall(r"--([\w-]+)", code)) | SBATCH | {word.lstrip("-") for word in PYTEST}
    found |= {
        name for action in launch_command_parser()._actions for name in (o.lstrip("-") for o in action.option_strings)
    }
    for one in RLHF.values():
        module = importlib.import_module(f"rlhf.cli.{one.module}")
        kinds = [value for value in vars(module).values() if hasattr(value, "__dataclass_fields__")]
        found |= {field.name for kind in kinds for field in fields(kind)}
    return found | {"config", "help"}


@pytest.mark.parametrize("name", NAMES)
def test_flags_that_are_named_exist(name, known_flags):
    for word in inline_code(TEXTS[name]):
        if flag := re.match(r"--([\w-]+)", word):
            assert flag[1] in known_flags, f"{name}: {word}"


def test_variables_that_are_named_are_read():
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("rlhf", "slurm", "scripts", "tests/gpu", "tests/faults")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".sbatch")
    )
    for name, text in TEXTS.items():
        for variable in re.findall(r"\bRLHF_[A-Z_]+\b", text):
            assert variable in code, f"{name}: {variable}"


# --- Metrics and files ------------------------------------------------------------------------------------------


def glossary(title):
    """Keys of the first table below a line of docs/outputs.md that begins so, as patterns."""
    text = TEXTS["docs/outputs.md"].split(f"\n{title}", 1)[1]
    table = re.search(r"((?:^\|.*\n)+)", text, re.MULTILINE)[1]
    keys = [key for row in table.splitlines()[2:] for key in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert keys
    return [re.sub(r"\b(NAME|PHASE)\b", r"[\\w-]+", key) for key in keys]


def compare(rows, patterns, may_be_missing=()):
    """Every key that was written is explained, and what is explained was written."""
    keys = {key for row in rows for key in row}
    assert {key for key in keys if not any(re.fullmatch(p, key) for p in patterns)} == set(), "not in the glossary"
    unseen = {p for p in patterns if not any(re.fullmatch(p, key) for key in keys)}
    assert unseen == set(may_be_missing), "in the glossary, but never written"


def test_every_metric_of_ppo_is_explained(tmp_path):
    rows = tiny_ppo.PROMPTS[:4]
    options = {"num_train_epochs": 1, "eval_strategy": "steps", "eval_steps": 1, "kl_target": 0.05}
    tiny_ppo.trainer(tmp_path, rows=rows, given={"eval_dataset": rows[:2]}, **options).train()
    read = lambda name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]  # noqa: E731
    compare(read("metrics.jsonl"), glossary("`metrics.jsonl` of PPO"))
    compare(read("eval_metrics.jsonl"), ["step", *glossary("`eval_metrics.jsonl` has")])


def test_every_metric_of_a_reward_stage_is_explained(tmp_path):
    tokenizer = tiny.chat_tokenizer()
    pairs = load_pairs("demo:preferences.jsonl", None, None)[0][:6]
    rows = encode_pairs(tokenizer, pairs, 256)[1]
    args = RewardStageConfig(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        disable_tqdm=True,
    )
    train_reward_model(tiny.llama_reward(), tokenizer, rows[:4], rows[4:], args)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    compare(found, glossary("`metrics.jsonl` of a reward stage"))


INTERNAL = {
    "WarningState",
    "LossSums",
    "SideScores",
    "ScoredPairs",
    "CheckpointFacts",
}  # states that only resuming reads
KINDS = {
    name: kind
    for name, kind in vars(file_types).items()
    if is_typeddict(kind) and kind.__module__ == file_types.__name__ and name not in INTERNAL
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_field_of_a_file_is_explained(kind):
    words = {part for word in inline_code(TEXTS["docs/outputs.md"]) for part in word.split(".")}
    assert set(kind.__annotations__) - words == set()


# --- Python -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_hub(monkeypatch, tmp_path):
    """from_pretrained gives tiny models, whatever the name; what is written goes to a folder of the test."""
    monkeypatch.chdir(tmp_path)
    for kind, make in (
        ("AutoTokenizer", tiny.chat_tokenizer),
        ("AutoModelForCausalLM", tiny.llama),
        ("AutoModelForSequenceClassification", tiny.llama_reward),
    ):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", lambda *_, make=make, **__: make())


@pytest.mark.parametrize("name", [n for n in NAMES if any(kind == "python" for kind, _ in blocks(TEXTS[n]))])
def test_python_blocks_run(name, tiny_hub):
    for number, (kind, lines) in enumerate(blocks(TEXTS[name])):
        if kind == "python":
            space = {"tokenizer": tiny.chat_tokenizer(), "policy": tiny.llama(), "reward_model": tiny.llama_reward()}
            exec(compile("\n".join(lines), f"{name}, block {number}", "exec"), space)


def test_the_version_is_in_the_changelog():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert re.search(rf"^## {re.escape(version)} ", TEXTS["CHANGELOG.md"], re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_name_what_is_there(path):
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert found["name"]
    assert found[True], "when it runs; YAML reads `on` as true"
    for job in found["jobs"].values():
        assert job["runs-on"]
        assert all("uses" in step or "run" in step for step in job["steps"])
        text = yaml.safe_dump(job)
        for name in re.findall(r"(?:tests|scripts|slurm)/[\w./]*", text):
            assert (ROOT / name).exists(), name


# --- The table of TRL's defects ---------------------------------------------------------------------------------

TABLE = TEXTS["docs/trl-defects.md"]
NAMED = sorted({(file, name) for file, name in re.findall(r"`([\w/.]*)::(\w+)`", TABLE)})


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[f"{file}-{name}" for file, name in NAMED])
def test_every_test_named_is_there(file, name):
    path = TESTS / ("test_ppo_invariants.py" if file == "inv" else file)
    assert path.is_file(), f"{file}: no such file"
    assert re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE), f"{name}: not in {file}"


def test_every_defect_has_one_row_with_a_test():
    rows = [line for line in TABLE.splitlines() if re.match(r"\| [AC]?\d+ \|", line)]
    names = [line.split("|")[1].strip() for line in rows]
    assert names == [f"A{i}" for i in range(1, 41)] + [f"C{i}" for i in range(1, 18)] + [str(i) for i in range(1, 16)]
    assert [line for line in rows if not re.search(r"`[\w/.]+::\w+`", line.split("|")[-2])] == []


def test_no_file_is_named_that_is_not_there():
    files = set(re.findall(r"`((?:\w+/)*test_\w+\.py)`", TABLE))
    assert [file for file in files if not (TESTS / file).is_file()] == []
