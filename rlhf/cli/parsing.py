"""Read settings from a recipe and command-line flags; turn a user's mistake into one line."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import TrainingArguments
from trl import TrlParser

from rlhf.config.precision import give_reason
from rlhf.distributed.collectives import from_main, join_processes
from rlhf.errors import UserError
from rlhf.storage.stages import read_run

_MAX_BYTES = 1 << 20  # of a recipe; ours are a thousand times smaller

_MAX_NUMBER = 1e12  # larger than any sensible size or rate


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:  # argparse prints its whole usage otherwise
        raise UserError(message)


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate fields and aliases, which can expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias, {self.peek_event().anchor!r}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"field {key.value!r} twice, again in line {key.start_mark.line + 1}")
            seen |= {key.value} if isinstance(key.value, str) else set()
        return super().construct_mapping(node, deep)


def parse(
    kinds: list[Any], argv: Sequence[str] | None = None, stage: Callable[[argparse.Namespace], str] | None = None
) -> tuple[Any, ...]:
    """Settings of the given dataclasses from `--config RECIPE.yaml` and `--field value` flags, flags winning.

    A recipe field that no dataclass has, or a value of another type, is a UserError that names file and field.

    stage: the name of a training stage, from the given fields. If it has begun already, it keeps its precision, where
    none is given: another machine would choose another one.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclass_types=kinds, allow_abbrev=False, formatter_class=_Formatter)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="recipe whose values replace the defaults")
    for action in parser._actions:
        if callable(action.type):
            action.type = _checked(action.type)
    recipe = _take_config(argv)
    if recipe is not None:
        flags = [flag for name, value in read_recipe(recipe).items() for flag in _as_flags(parser, recipe, name, value)]
        argv = flags + argv
    kept = _kept_precision(parser, argv, stage) if stage else []
    try:
        *settings, rest, unknown = parser.parse_args_into_dataclasses([*kept, *argv], return_remaining_strings=True)
    except UserError:
        raise
    except ValueError as error:  # how transformers' own settings refuse a value
        where = f"recipe {recipe}" if recipe else "command line"
        raise UserError(f"{where}: invalid values: {' '.join(str(error).split())}") from error
    del rest
    if unknown:
        raise UserError(f"command line: unknown field {unknown[0]!r}; --help lists all fields")
    for one in settings if kept else ():
        if isinstance(one, TrainingArguments):
            give_reason(one, "as this run began")
    return tuple(settings)


def _kept_precision(parser: TrlParser, argv: Sequence[str], stage: Callable[[argparse.Namespace], str]) -> list[str]:
    """Flags for the precision that the stage began with; none if it has not begun, or if one is given."""
    given, _ = parser.parse_known_args(argv)
    if given.bf16 is not None or given.fp16:
        return []
    join_processes(given.ddp_timeout, given.use_cpu, given.ddp_backend)
    config = from_main(lambda: read_run(Path(given.runs_dir) / given.run / stage(given))).get("config", {})
    return [f"--{name}={bool(config[name])}" for name in ("bf16", "fp16") if config.get(name) is not None]


def _checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap an argument's type so that it refuses nan and absurdly large numbers, and says what it expected."""

    def value(text: str) -> Any:
        try:
            found = read(text)
        except (ValueError, TypeError) as error:
            name = getattr(read, "__name__", "")
            wanted = name if name in ("int", "float") else "a valid value"
            raise argparse.ArgumentTypeError(f"expected {wanted}, found {text[:80]!r}") from error
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"expected yes or no, found {text[:80]!r}") from error
        if isinstance(found, int | float) and not -_MAX_NUMBER <= found <= _MAX_NUMBER:
            raise argparse.ArgumentTypeError(f"expected a number between ±{_MAX_NUMBER:g}, found {text[:80]!r}")
        return found

    return value


class _Formatter(argparse.HelpFormatter):
    """Help as argparse formats it; transformers' texts already hold the defaults."""


def _take_config(argv: list[str]) -> Path | None:
    given = [i for i, argument in enumerate(argv) if argument == "--config" or argument.startswith("--config=")]
    if len(given) > 1:
        raise UserError(f"--config: give one recipe, not {len(given)}")
    for i in given:
        if argv[i] != "--config":
            return Path(argv.pop(i).partition("=")[2])
        if i + 1 < len(argv):
            del argv[i]
            return Path(argv.pop(i))
    return None


def read_recipe(recipe: Path) -> dict[str, Any]:
    """The fields of a recipe file. A UserError if it is not a YAML mapping."""
    try:
        with recipe.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"recipe {recipe}: cannot read it: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise UserError(f"recipe {recipe}: expected at most {_MAX_BYTES:,} bytes; the file is larger")
    try:
        found = yaml.load(content, _Loader)
    except Exception as error:  # of many kinds: also from the parsers of numbers and dates
        raise UserError(f"recipe {recipe}: not valid YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(found, dict):
        kind = "nothing" if found is None else type(found).__name__
        raise UserError(f"recipe {recipe}: expected fields with values, found {kind}")
    return found


def _as_flags(parser: TrlParser, recipe: Path, name: str, value: Any) -> list[str]:
    """One recipe line as command-line flags, so that files and flags are checked by the same rules."""
    where = f"recipe {recipe}: field {name!r}"
    action = next((a for a in parser._actions if a.dest == name and a.dest not in ("config", "help")), None)
    if action is None:
        raise UserError(f"{where}: unknown field; --help lists all fields")
    if value is None:
        return []
    if isinstance(value, list) and (action.nargs != "+" or not value):
        raise UserError(f"{where}: expected {'one value' if action.nargs != '+' else 'values'}, found {value!r:.80}")
    texts = [json.dumps(item) if isinstance(item, dict) else str(item) for item in _scalars(where, value)]
    for text in texts:
        try:
            parsed = action.type(text) if callable(action.type) else text
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{where}: {error}") from None
        if action.choices and parsed not in action.choices:
            options = ", ".join(map(str, action.choices))
            raise UserError(f"{where}: expected one of {options}, found {text!r}")
    # A single value may begin with a dash.
    return [f"--{name}", *texts] if isinstance(value, list) else [f"--{name}={texts[0]}"]


def _scalars(where: str, value: Any) -> list[Any]:
    """The values of a field: one, several, or named ones. A UserError for anything nested deeper."""
    values = value if isinstance(value, list) else [value]
    inner = [item for one in values for item in (one.values() if isinstance(one, dict) else [one])]
    if any(isinstance(item, list | dict | set) for item in inner):
        raise UserError(f"{where}: expected plain values, found {value!r:.80}")
    return values


def required(name: str, value: Any) -> Any:
    """The value of a field that has no default. A UserError if it is not set."""
    if value is None:
        raise UserError(f"{name}: set it in the recipe or by --{name}")
    return value
