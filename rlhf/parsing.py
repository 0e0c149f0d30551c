"""From a recipe and flags to settings, and from a user's mistake to one line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from rlhf.errors import UserError

RECIPES = Path(__file__).parent / "recipes"


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:  # argparse prints its whole usage otherwise
        raise UserError(message)


def parse(kinds: list[Any], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Settings of the given dataclasses from `--config RECIPE.yaml` and `--field value` flags, flags winning.

    A recipe field that no dataclass has, or a value of another type, is a UserError that names file and field.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclass_types=kinds, allow_abbrev=False, formatter_class=_Formatter)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="recipe whose values replace the defaults")
    recipe = _take_config(argv)
    if recipe is not None:
        flags = [flag for name, value in read_recipe(recipe).items() for flag in _as_flags(parser, recipe, name, value)]
        argv = flags + argv
    try:
        *settings, rest, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except UserError:
        raise
    except ValueError as error:  # how transformers' own settings refuse a value
        where = f"recipe {recipe}" if recipe else "command line"
        raise UserError(f"{where}: expected values that can be used, found: {' '.join(str(error).split())}") from error
    del rest
    if unknown:
        raise UserError(f"command line: expected a known field, found {unknown[0]!r} (see --help)")
    return tuple(settings)


class _Formatter(argparse.HelpFormatter):
    """Help with every field on a line of its own; defaults are in transformers' texts already."""


def _take_config(argv: list[str]) -> Path | None:
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            del argv[i]
            return Path(argv.pop(i))
        if argument.startswith("--config="):
            return Path(argv.pop(i).partition("=")[2])
    return None


def recipe_folder(name: str) -> Path:
    """The folder of a recipe: a name in rlhf/recipes, or a path."""
    for folder in (RECIPES / name, Path(name)):
        if any(folder.glob("*.yaml")):
            return folder
    known = ", ".join(sorted(path.name for path in RECIPES.iterdir() if path.is_dir()))
    raise UserError(f"recipe: expected one of {known}, or a folder of stage recipes, found {name!r}")


def read_recipe(recipe: Path) -> dict[str, Any]:
    """The fields of a recipe file; a UserError if it is no YAML mapping."""
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {recipe}: expected a YAML file, found: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {recipe}: expected YAML, found: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {recipe}: expected fields with values, found {type(content).__name__}")
    return content


def _as_flags(parser: TrlParser, recipe: Path, name: str, value: Any) -> list[str]:
    """One recipe line as command-line flags, so that files and flags are checked by the same rules."""
    action = next((a for a in parser._actions if a.dest == name), None)
    if action is None:
        raise UserError(f"recipe {recipe}: field {name!r}: expected a field that --help lists, found none such")
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    for item in values:
        try:
            parsed = action.type(str(item)) if callable(action.type) else str(item)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            kind = getattr(action.type, "__name__", "value")
            raise UserError(f"recipe {recipe}: field {name!r}: expected {kind}, found {item!r}") from None
        if action.choices and parsed not in action.choices:
            options = ", ".join(map(str, action.choices))
            raise UserError(f"recipe {recipe}: field {name!r}: expected one of {options}, found {item!r}")
    return [f"--{name}", *map(str, values)]


def required(name: str, value: Any) -> Any:
    """The value of a field that has no default; not set is the user's mistake."""
    if value is None:
        raise UserError(f"{name}: expected a value in the recipe or as --{name}, found none")
    return value
