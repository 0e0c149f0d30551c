"""Read settings from a recipe and command-line flags; turn a user's mistake into one line."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from enum import Enum
from inspect import isclass
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from rlhf.config.old_names import new_name
from rlhf.errors import UserError, did_you_mean
from rlhf.storage.basis import Asked, digest_of

_MAX_BYTES = 1 << 20  # of a recipe; ours are a thousand times smaller

_MAX_NUMBER = 1e12  # larger than any sensible size or rate

_YES, _NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


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


@dataclass(frozen=True)
class Setting:
    """A field of a settings class, as flags and recipes give it."""

    name: str
    read: Callable[[str], Any]  # a ValueError says what was expected
    several: bool  # takes one value or more
    switch: bool  # yes or no; the flag alone means yes
    choices: tuple[str, ...]  # all values that there are, or () if they cannot be listed
    shape: str  # of a value, for the help
    default: Any
    text: str

    def values(self, texts: Sequence[str]) -> Any:
        """The field's value. A ValueError says what is wrong with the texts."""
        found = [self.read(text) for text in texts]
        return found if self.several else found[0]


def settings_of(kinds: Sequence[Any]) -> dict[str, Setting]:
    """The fields of these dataclasses that a text can set, by name."""
    found = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        for field in fields(kind):
            form = _form(hints[field.name], tuple(field.metadata.get("choices", ())))
            if field.init and form is not None:
                default = field.default_factory() if field.default_factory is not MISSING else field.default
                found[field.name] = Setting(field.name, *form, default, field.metadata.get("help", ""))
    return found


def _form(hint: Any, choices: tuple[str, ...]) -> tuple[Callable[[str], Any], bool, bool, tuple[str, ...], str] | None:
    """How a field of this type is read: `read`, `several`, `switch`, `choices` and `shape` of a Setting.

    Of a union it is the first that fits: yes or no, a choice, text, a number, a list, a mapping. None: no text can say
    a value of this type.
    """
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    members = tuple(member for member in members if member is not NoneType)
    if bool in members:
        return _yes_or_no, False, True, (), "yes|no"
    for member in members:
        if get_origin(member) is Literal and str in map(type, get_args(member)):
            choices = get_args(member)
        elif isclass(member) and issubclass(member, Enum):
            choices = tuple(str(one.value) for one in member)
    if choices:
        return _choice(choices), False, False, choices, "|".join(choices)
    for member, read, shape in ((str, str, "TEXT"), (float, _number(float), "X"), (int, _number(int), "N")):
        if member in members:
            return read, False, False, (), shape
    of_list = next((get_args(member)[0] for member in members if get_origin(member) is list), None)
    if of_list is not None and (inner := _form(of_list, ())):
        return inner[0], True, False, inner[3], f"{inner[4]} ..."
    if any(member is dict or get_origin(member) is dict for member in members):
        return _mapping, False, False, (), "JSON"
    return None


def _yes_or_no(text: str) -> bool:
    if text.lower() not in (*_YES, *_NO):
        raise ValueError(f"expected yes or no, found {text[:80]!r}")
    return text.lower() in _YES


def _choice(known: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(f"expected one of {', '.join(known)}, found {text[:80]!r}{did_you_mean(text, known)}")
        return text

    return read


def _number(kind: type) -> Callable[[str], Any]:
    """Reads an int or float; refuses nan and absurdly large numbers."""

    def read(text: str) -> Any:
        try:
            found = kind(text)
        except ValueError:
            raise ValueError(f"expected {kind.__name__}, found {text[:80]!r}") from None
        if not -_MAX_NUMBER <= found <= _MAX_NUMBER:
            raise ValueError(f"expected a number between ±{_MAX_NUMBER:g}, found {text[:80]!r}")
        return found

    return read


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {text[:80]!r}")
    return found


def parse(
    kinds: list[Any], argv: Sequence[str] | None = None, stage: Callable[[SimpleNamespace], str] | None = None
) -> tuple[Any, ...]:
    """Settings of the given dataclasses from `--config RECIPE.yaml` and `--field value` flags, flags winning.

    A recipe field that no dataclass has, or a value of another type, is a UserError that names file and field.

    stage: the name of a training stage, from the given fields. If it has begun already, it keeps its precision, where
    none is given: another machine would choose another one.
    """
    known = settings_of(kinds)
    asked, recipe = _asked(known, argv)
    given = dict(asked.given)
    kept = {}
    if stage is not None:
        from rlhf.cli.kept_precision import kept_precision, says_so  # slow

        fields_so_far = SimpleNamespace(**{name: one.default for name, one in known.items()} | given)
        kept = kept_precision(fields_so_far, stage(fields_so_far))
        given = kept | given
    made = []
    for kind in kinds:
        names = {field.name for field in fields(kind)}
        try:
            made.append(kind(**{name: value for name, value in given.items() if name in names}))
        except UserError:
            raise
        except ValueError as error:  # how transformers' own settings refuse a value
            where = f"recipe {recipe}" if recipe else "command line"
            raise UserError(f"{where}: invalid values: {' '.join(str(error).split())}") from error
    if kept:
        says_so(made)
    return tuple(made)


def read_asked(kinds: Sequence[Any], argv: Sequence[str] | None = None) -> Asked:
    """What a stage is asked for: the fields that recipe and flags set, as `parse` reads them, and all defaults."""
    known = settings_of(kinds)
    return replace(_asked(known, argv)[0], defaults={name: one.default for name, one in known.items()})


def _asked(known: dict[str, Setting], argv: Sequence[str] | None) -> tuple[Asked, Path | None]:
    flags, recipe = _read_flags(list(sys.argv[1:] if argv is None else argv), known)
    of_recipe = {} if recipe is None else read_fields(f"recipe {recipe}", read_recipe(recipe), known)
    digest = None if recipe is None else digest_of(recipe)
    world = int(os.environ.get("WORLD_SIZE") or 1)
    return Asked(of_recipe | flags, flags=flags, recipe=digest, redo=bool(flags.get("redo")), processes=world), recipe


def _read_flags(argv: list[str], known: dict[str, Setting]) -> tuple[dict[str, Any], Path | None]:
    """The fields that the command line sets, and its recipe.

    `--learning-rate` is read as `--learning_rate`, and `--no_gold` as `--gold no`. The last of several wins.
    """
    given: dict[str, Any] = {}
    recipes: list[str] = []
    while argv:
        word = argv.pop(0)
        flag, equals, value = word.partition("=")
        texts = [value] if equals else []
        while not equals and argv and not argv[0].startswith("--"):
            texts.append(argv.pop(0))
        name = flag.removeprefix("--").replace("-", "_")
        one = known.get(name)
        if one is None and name.startswith("no_") and name[3:] in known and known[name[3:]].switch and not texts:
            name, one, texts = name[3:], known[name[3:]], ["no"]
        if flag in ("-h", "--help"):
            raise UserError("command line: rlhf COMMAND --help lists the fields of a command")
        if not flag.startswith("--") or (one is None and name != "config"):
            raise UserError(f"command line: unknown field {flag!r}{_meant(name, [*known, 'config'], '--')}")
        if len(texts) > 1 and not (one and one.several):
            raise UserError(f"command line: unknown field {texts[1]!r}; --{name} {texts[0]} takes one value")
        if one is None:
            if not texts:
                raise UserError("--config: expected a recipe's file after it")
            recipes.append(texts[0])
            continue
        if not texts and not one.switch:
            raise UserError(f"--{name}: expected a value after it")
        try:
            given[name] = one.values(texts or ["yes"])
        except ValueError as error:
            raise UserError(f"--{name}: {error}") from None
    if len(recipes) > 1:
        raise UserError(f"--config: give one recipe, not {len(recipes)}")
    return given, Path(recipes[0]) if recipes else None


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


def read_fields(recipe: str, content: Mapping[str, Any], known: Mapping[str, Setting]) -> dict[str, Any]:
    """A recipe's values by field: read as text, so that recipes and flags are checked by the same rules."""
    given = {}
    for name, value in content.items():
        where = f"{recipe}: field {name!r}"
        one = known.get(name)
        if one is None:
            raise UserError(f"{where}: unknown field{_meant(name, known)}")
        if value is None:
            continue
        if isinstance(value, list) and not (one.several and value):
            expected = "values" if one.several else "one value"
            raise UserError(f"{where}: expected {expected}, found {value!r:.80}")
        texts = [json.dumps(item) if isinstance(item, dict) else str(item) for item in _scalars(where, value)]
        try:
            given[name] = one.values(texts)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    return given


def _meant(name: object, known: Iterable[str], dashes: str = "") -> str:
    """The end of an error line on an unknown field: what to use in its place."""
    known = list(known)
    if use := new_name(str(name), known):
        return f"; use {dashes if not use.startswith('nothing') else ''}{use}"
    return did_you_mean(name, known).replace(" '", f" '{dashes}") or "; --help all lists all fields"


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
