"""The command `rlhf`: its help, how soon it comes, and what it says to a slip of the pen."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib import metadata
from inspect import get_annotations
from pathlib import Path

import peft  # noqa: F401 - what is imported is not hidden from a help in this process
import pytest
from limits import HANG

import rlhf
from rlhf import config
from rlhf.cli import __main__ as command
from rlhf.cli.help import TOPICS, page
from rlhf.cli.parsing import settings_of
from rlhf.errors import did_you_mean

ROOT = Path(__file__).parents[2]
COMMANDS = command.COMMANDS
WITH_FIELDS = [name for name, one in COMMANDS.items() if one.kinds]


def kinds_of(name):
    return [getattr(config, kind) for kind in COMMANDS[name].kinds]


def helped(name, capsys, monkeypatch, *argv):
    monkeypatch.setenv("COLUMNS", "120")  # whatever the terminal of the tests has
    monkeypatch.setattr("sys.argv", [f"rlhf {name}", *argv])
    command.run(name)
    return capsys.readouterr().out


class Parsed(BaseException):
    """What a command asked for."""


@pytest.mark.parametrize("name", WITH_FIELDS)
def test_help_shows_what_the_command_reads(name, monkeypatch):
    module = importlib.import_module(f"rlhf.cli.{COMMANDS[name].module}")

    def only_ask(kinds, *_, **__):
        raise Parsed(kinds)

    monkeypatch.setattr(module, "parse", only_ask)
    monkeypatch.setattr("sys.argv", ["rlhf", *list(COMMANDS[name].actions)[:1]])
    with pytest.raises(Parsed) as asked:
        module.main()
    assert asked.value.args[0] == kinds_of(name)


@pytest.mark.parametrize("name", WITH_FIELDS)
def test_short_help_fits_two_screens_with_one_spelling_per_flag(name, capsys, monkeypatch):
    text = helped(name, capsys, monkeypatch, "--help")
    assert len(text.splitlines()) <= 80
    assert max(map(len, text.splitlines())) <= 120
    flags = re.findall(r"^  --(\S+)", text, re.MULTILINE)
    assert len(flags) == len(set(flags))
    assert [flag for flag in flags if "-" in flag or flag.startswith("no_")] == []


@pytest.mark.parametrize("name", WITH_FIELDS)
@pytest.mark.parametrize("asked", [("--help", "all"), ("--help-all",), ("--run", "x", "--help=all")])
def test_help_all_shows_every_field_that_may_be_set(name, asked, capsys, monkeypatch):
    text = helped(name, capsys, monkeypatch, *asked)
    flags = re.findall(r"^  --(\S+)", text, re.MULTILINE)
    known = set(settings_of(kinds_of(name))) - getattr(kinds_of(name)[-1], "WITHOUT_EFFECT", set())
    assert sorted(set(flags) - {"config"}) == sorted(known)
    assert len(flags) == len(set(flags))


def test_what_one_sets_first_is_grouped(capsys, monkeypatch):
    text = helped("ppo", capsys, monkeypatch, "-h")
    parts = {part.splitlines()[0]: part for part in text.split("\n\n")}
    assert "--run TEXT" in parts["Run"]
    assert "--config RECIPE.yaml" in parts["Run"]
    assert re.search(r"--learning_rate X +peak .* \[default: 1e-05\]", parts["Learning"])
    assert re.search(r"--response_length N +maximum tokens per response \[default: 128\]", parts["Sampling"])
    more = re.search(r"rlhf ppo --help all lists (\d+) more fields", text)[1]
    everything = helped("ppo", capsys, monkeypatch, "--help", "all")
    assert len(re.findall(r"^  --", everything, re.M)) == len(re.findall(r"^  --", text, re.M)) + int(more)
    for kind, topics in TOPICS.items():
        names = [name for names in topics.values() for name in names]
        assert len(names) == len(set(names)), kind


def test_a_command_shows_its_own_defaults(capsys, monkeypatch):
    text = helped("quickstart", capsys, monkeypatch, "--help")
    assert re.search(r"--run .*\[default: demo\]", text)
    assert re.search(r"--run .*\[default: default\]", helped("pipeline", capsys, monkeypatch, "--help"))


UNITS = (
    "bandwidth|batch|coefficient|confidence level|factor|id|lambda|mean|microseconds|minutes|nats?|optimizer steps|"
    "pairs|pass(es)?|port|processes|prompts|range|rank|rate|responses|reward units|rows|runs|samples|seconds|seeds?|"
    "share|standard deviation|steps|temperature|TFLOP/s|times|tokens?|updates|weight"
)


@pytest.mark.parametrize("command", WITH_FIELDS)
def test_every_own_field_has_a_text_with_unit_and_default(command):
    kinds = kinds_of(command)
    text, wrong = page("rlhf", [], kinds, True, {}), []
    for name, one in settings_of(kinds).items():
        owner = next(owner for kind in kinds for owner in kind.__mro__ if name in get_annotations(owner))
        if not owner.__module__.startswith("rlhf."):
            continue
        if name in getattr(kinds[-1], "WITHOUT_EFFECT", ()):
            continue
        shown = re.search(rf"^  --{name} .*(\n {{30,}}.*)*", text, re.MULTILINE)[0]
        has_default = "default:" in " ".join(shown.split()) or one.default in ([], "")
        has_unit = one.shape[0] not in "NX" or re.search(rf"\b({UNITS})\b", one.text)
        if not (one.text and has_default and has_unit):
            wrong.append(shown)
    assert wrong == []


def start(*argv):
    code = "import sys; from rlhf.cli.__main__ import main; sys.argv = ['rlhf', *sys.argv[1:]]\n"
    code += "slow = ('torch', 'peft', 'transformers', 'trl', 'accelerate')\n"
    code += "try: main()\nfinally: print([name for name in slow if sys.modules.get(name)])"
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=HANG)


@pytest.mark.parametrize("name", ["", *(name for name, one in COMMANDS.items() if not one.heavy)])
def test_help_comes_before_anything_slow_is_imported(name):
    done = start(*filter(None, [name, "--help"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("quikstart",), "found 'quikstart'; did you mean 'quickstart'?"),
        (("report", "--rum", "a"), "unknown field '--rum'; did you mean '--run'?"),
        (("evaluate", "--eval-tempratur", "1"), "'--eval-tempratur'; did you mean '--eval_temperature'?"),
        (
            ("pipeline", "--executor", "slrm"),
            "--executor: expected one of local, slurm, found 'slrm'; did you mean 'slurm'?",
        ),
        (("compare", "--run", "a/b"), "run: expected a plain folder name"),
        (("evaluate", "--seed", "1"), "'--seed'; did you mean '--prompt_seed' or '--eval_seed'?"),
        (("benchmark", "--shape", "sed"), "found 'sed'; did you mean 'seed'?"),
    ],
)
def test_a_slip_of_the_pen_is_answered_at_once(argv, words):
    done = start(*argv)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", [name for name, one in COMMANDS.items() if one.heavy])
def test_help_without_torch_is_the_same(name, capsys, monkeypatch):
    expected = helped(name, capsys, monkeypatch, "--help", "all").splitlines()
    done = start(name, "--help", "all")
    *shown, imported = done.stdout.splitlines()
    assert shown == expected
    assert imported == "['transformers', 'trl']"
    assert done.stderr == ""


def test_what_is_not_close_is_not_suggested():
    known = ["learning_rate", "Anthropic", "kl_coef"]
    assert did_you_mean("learning_rat", known) == "; did you mean 'learning_rate'?"
    assert did_you_mean("ANTHROPIC", known) == "; did you mean 'Anthropic'?"
    fields = [
        "prompt_seed",
        "eval_seed",
        *(f"{kind}_batch_size" for kind in ("train", "evaluation", "rollout", "global")),
    ]
    assert did_you_mean("seed", fields) == "; did you mean 'prompt_seed' or 'eval_seed'?"
    assert did_you_mean("size", fields) == ""  # too many
    assert did_you_mean("gamma", known) == did_you_mean("", known) == did_you_mean(5, []) == ""


def test_the_package_lists_its_names():
    """So that a shell or an editor completes them; nothing slow is imported for it."""
    code = "import rlhf, sys; print(dir(rlhf), rlhf.__version__, 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG).stdout
    for name in ("PPOTrainer", "PPOConfig", "UserError", "__version__"):
        assert repr(name) in said
    assert said.endswith(f" {metadata.version('rlhf')} False\n")
    assert set(rlhf.__all__) <= set(dir(rlhf))
    assert {name for name in config.__all__ if getattr(config, name)} <= set(dir(config))


def test_scripts_are_thin_doors():
    modules = {f"{one.module}.py" for one in COMMANDS.values()} - {"gpu_check.py", "plan.py"}
    assert {path.name for path in (ROOT / "scripts").glob("*.py")} == modules
    for path in (ROOT / "scripts").glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) < 15
        assert COMMANDS[re.search(r'run\("([\w-]+)"\)', text)[1]].module == path.stem


def test_choices_are_those_of_the_code():
    """They are repeated where nothing slow is imported."""
    from rlhf.benchmark.growth import SIZES
    from rlhf.benchmark.predict import GPUS
    from rlhf.benchmark.work import SHAPES, WORKS

    known = settings_of([config.BenchmarkConfig])
    assert known["shape"].choices == tuple(SHAPES)
    assert known["work"].choices == WORKS
    assert set(SIZES) == {"seed", "tiny"}
    assert all(name in known["predict"].text for name in GPUS)


def test_plan_has_a_help(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        helped("plan", capsys, monkeypatch, "--help")
    assert "--recipe" in capsys.readouterr().out


def test_a_field_that_has_no_effect_is_not_offered():
    kind = config.PPOStageConfig
    assert kind.WITHOUT_EFFECT
    names = {field.name for field in fields(kind)} | {field.name for field in fields(config.ModelConfig)}
    assert names >= kind.WITHOUT_EFFECT


def called(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["rlhf", *argv])
    command.main()


@pytest.mark.parametrize("argv", [(), ("-h",), ("--help",)])
def test_without_a_command_all_are_listed(monkeypatch, capsys, argv):
    called(monkeypatch, *argv)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "usage: rlhf COMMAND [--field value ...]"
    assert [line.split()[0] for line in said[2 : 2 + len(COMMANDS)]] == list(COMMANDS)
    assert said[-1].startswith("rlhf COMMAND --help lists ")


def test_a_command_gets_the_rest_of_the_line_and_only_a_pipeline_begins_anew(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(command, "keep_freed_memory", lambda: ran.append("memory"))
    monkeypatch.setattr(command, "run", lambda name: ran.append([name, *sys.argv]))
    called(monkeypatch, "ppo", "--run", "x")
    called(monkeypatch, "pipeline", "--run", "x")
    called(monkeypatch, "pipeline", "--help")
    assert ran == [
        ["ppo", "rlhf ppo", "--run", "x"],
        "memory",
        ["pipeline", "rlhf pipeline", "--run", "x"],
        ["pipeline", "rlhf pipeline", "--help"],
    ]
    called(monkeypatch, "--version")
    assert capsys.readouterr().out == f"{rlhf.__version__}\n"
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, "pipline")
    assert ended.value.code == 2
    words = "found 'pipline'; did you mean 'pipeline'?\n"
    assert capsys.readouterr().err == f"error: rlhf: expected a command, one of {', '.join(COMMANDS)}, {words}"


@pytest.mark.parametrize(
    ("platform", "given", "again"),
    [
        ("linux", (), True),
        ("linux", ("MALLOC_TRIM_THRESHOLD_",), False),  # the second start, or the user's own
        ("linux", ("MALLOC_MMAP_THRESHOLD_",), False),
        ("darwin", (), False),
    ],
)
def test_freed_memory_is_kept_from_the_second_start_on(monkeypatch, platform, given, again):
    started = []
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.setenv(name, "1")
        if name not in given:
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-P", "rlhf", "pipeline"])
    monkeypatch.setattr("os.execv", lambda *given: started.append((*given, dict(os.environ))))
    command.keep_freed_memory()
    assert bool(started) is again
    if again:
        ((program, argv, environment),) = started
        assert (program, argv) == (sys.executable, [sys.executable, "-P", "rlhf", "pipeline"])
        assert environment["MALLOC_TRIM_THRESHOLD_"] == environment["MALLOC_MMAP_THRESHOLD_"] == "4294967296"


def test_a_mistake_is_told_before_anything_slow_is_imported(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rlhf compare", "--prmpt", "x"])
    monkeypatch.setattr(command, "import_module", None)
    with pytest.raises(SystemExit) as ended:
        command.run("compare")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: command line: unknown field '--prmpt'; did you mean '--prompt'?\n"
