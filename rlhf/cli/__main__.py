"""The command `rlhf`: its sub-commands, each imported only when it is called."""

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module

from rlhf import __version__, config
from rlhf.cli.help import page
from rlhf.cli.parsing import parse
from rlhf.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Command:
    """A sub-command of rlhf."""

    module: str  # rlhf.cli.MODULE has its main
    does: str
    kinds: tuple[str, ...] = ()  # names in rlhf.config: what its main parses; () if it reads its flags itself
    actions: Mapping[str, str] = field(default_factory=dict)  # one of them comes before the flags -> what it does
    given: Mapping[str, str] = field(default_factory=dict)  # fields that it sets, unless the user does
    heavy: bool = False  # its settings take seconds to import


_WHERE = ("RunConfig", "PipelineConfig")
COMMANDS = {
    "quickstart": Command(
        "pipeline",
        "the demo: reward models, PPO full and LoRA, evaluation, report, in minutes on a CPU",
        _WHERE,
        given={"recipe": "demo", "run": "demo"},
    ),
    "pipeline": Command("pipeline", "run all stages of a recipe; run it again to resume", _WHERE),
    "reward": Command(
        "train_reward",
        "train a reward model",
        ("StageRunConfig", "PreferenceConfig", "ModelConfig", "RewardStageConfig"),
        heavy=True,
    ),
    "ppo": Command(
        "train_ppo",
        "train a policy with PPO, full or LoRA",
        ("StageRunConfig", "PromptConfig", "ModelConfig", "PPOStageConfig"),
        heavy=True,
    ),
    "evaluate": Command(
        "evaluate",
        "compare base and trained policies on unseen prompts",
        ("StageRunConfig", "PromptConfig", "EvaluationConfig"),
    ),
    "rate": Command(
        "rate",
        "blind human rating: make the sheet, serve it, import ratings",
        ("RunConfig", "RatingConfig"),
        actions={
            "sheet": "write ratings/sheet.html, the page for raters, and ratings/key.json, which they must not see",
            "serve": "offer the page on this machine (elsewhere: ssh -L PORT:127.0.0.1:PORT HOST), store what comes in",
            "import": "check raters' files, join them with those stored, write ratings/ratings.json",
        },
    ),
    "report": Command("report", "write a run's report: HTML, PDF, notebook", ("RunConfig", "ReportConfig")),
    "compare": Command(
        "compare",
        "type a prompt, read the answers of a run's models side by side",
        ("RunConfig", "CompareConfig"),
    ),
    "export": Command("export", "save a PPO checkpoint as a model", ("RunConfig", "ExportConfig")),
    "prepare": Command("prepare", "download what a recipe needs, for machines without network", ("PrepareConfig",)),
    "benchmark": Command(
        "benchmark", "time this trainer against TRL 1.12's, or predict a step's time", ("BenchmarkConfig",)
    ),
    "gpu-check": Command("gpu_check", "check this machine's GPU: correctness, speed, memory", ("GpuCheckConfig",)),
    "plan": Command("plan", "list the stages of a recipe and their state in a run"),
}


def usage() -> str:
    """The help text."""
    lines = [f"  {name:<10} {command.does}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rlhf COMMAND [--field value ...]",
            "",
            *lines,
            "",
            "rlhf COMMAND --help lists the fields that one usually sets, --help all every field.",
        ]
    )


def asked_for_help(argv: Sequence[str]) -> str:
    """`some` or `all` of the help, or "" if it is not asked for."""
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        if word in ("-h", "--help", "--help=all", "--help-all", "--help_all"):
            return "all" if word.endswith("all") or after == "all" else "some"
    return ""


def do_without_torch() -> None:
    """Let transformers find neither PyTorch nor PEFT, for a help: its settings are the same, and six seconds sooner."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that PyTorch was not found
    for name in ("torch", "peft"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def run(name: str) -> None:
    """Run a command with the flags in sys.argv. Help and, where that is quick, mistakes come before its imports."""
    command = COMMANDS[name]
    wanted = asked_for_help(sys.argv)
    if wanted and command.heavy:
        do_without_torch()
    kinds = [getattr(config, kind) for kind in command.kinds] if wanted or not command.heavy else []
    if kinds and wanted:
        prog = f"rlhf {name} {'|'.join(command.actions)}".rstrip()
        about = [f"{command.does[0].upper()}{command.does[1:]}."]
        about += [f"  {action:<8} {does}" for action, does in command.actions.items()]
        print(page(prog, about, kinds, wanted == "all", command.given))
        return
    sys.argv[1:1] = [f"--{key}={value}" for key, value in command.given.items()]
    if kinds and not command.actions:
        try:
            parse(kinds)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    gc.disable()  # imports leave no garbage, and to look for it would take a fifth of their time
    module = import_module(f"rlhf.cli.{command.module}")
    gc.enable()
    if name == "plan":  # free of torch, which run_script is not
        module.main()
    else:
        import_module("rlhf.cli.script").run_script(module.main)


def keep_freed_memory() -> None:
    """Start again with glibc told to keep freed memory for the next step; otherwise it is returned and requested again.

    On a CPU the steps are faster for it. glibc reads these variables when a process starts.
    """
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ.update(dict.fromkeys(names, str(4 << 30)))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif name not in COMMANDS:
        expected = f"expected a command, one of {', '.join(COMMANDS)}, found {name!r}{did_you_mean(name, COMMANDS)}"
        print(f"error: rlhf: {expected}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv[:2] = [f"rlhf {name}"]
        if COMMANDS[name].module == "pipeline" and not asked_for_help(sys.argv):
            keep_freed_memory()
        run(name)


if __name__ == "__main__":
    main()
