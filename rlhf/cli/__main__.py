"""The command `rlhf`: its sub-commands, each imported only when it is called."""

import sys
from importlib import import_module, metadata

# Name -> module in rlhf.cli, and what it does.
COMMANDS = {
    "pipeline": ("pipeline", "run all stages of a recipe; run it again to resume"),
    "reward": ("train_reward", "train a reward model"),
    "ppo": ("train_ppo", "train a policy with PPO, full or LoRA"),
    "evaluate": ("evaluate", "compare base and trained policies on unseen prompts"),
    "report": ("report", "write a run's report: HTML, PDF, notebook"),
    "rate": ("rate", "blind human rating: make the sheet, serve it, import ratings"),
    "compare": ("compare", "type a prompt, read the answers of a run's models side by side"),
    "prepare": ("prepare", "download what a recipe needs, for machines without network"),
    "benchmark": ("benchmark", "time this trainer against TRL 1.12's, or predict a step's time"),
    "gpu-check": ("gpu_check", "check this machine's GPU: correctness, speed, memory"),
    "plan": ("plan", "list the stages of a recipe and their state in a run"),
}


def usage() -> str:
    """The help text."""
    lines = [f"  {name:<10} {does}" for name, (_, does) in COMMANDS.items()]
    return "\n".join(
        ["usage: rlhf COMMAND [--field value ...]", "", *lines, "", "rlhf COMMAND --help lists its fields."]
    )


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(metadata.version("rlhf"))
    elif name not in COMMANDS:
        print(f"error: rlhf: expected a command, one of {', '.join(COMMANDS)}, found {name!r}", file=sys.stderr)
        sys.exit(2)
    else:
        module = import_module(f"rlhf.cli.{COMMANDS[name][0]}")
        sys.argv[:2] = [f"rlhf {name}"]
        if name == "plan":  # free of torch, which run_script is not
            module.main()
        else:
            import_module("rlhf.cli.script").run_script(module.main)


if __name__ == "__main__":
    main()
