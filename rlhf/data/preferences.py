"""Two responses and a column that says which one is better, as in PKU-SafeRLHF (Ji et al. 2024, arXiv:2406.15513)."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf.data.sources import one_line
from rlhf.errors import UserError

FIELDS = ("response_0", "response_1", "better_response_id")
_LISTS = ("responses", "completions", "answers")
_STEMS = ("response", "completion", "answer", "output", "conversation")
_ENDS = (("0", "1"), ("1", "2"), ("a", "b"))
_WHICH = ("better_response_id", "chosen", "preferred", "preference", "winner", "choice")
_NAMED = re.compile(r"(?:\w+[ _-])?([a-z0-9]+)(?:\.0)?")  # "1", "b", "model_a", "response 2"; 1.0 from a table


class Compared(NamedTuple):
    """The better and the worse response; of a tie any two."""

    better: Any
    worse: Any
    is_tie: bool


def compared(row: Mapping[str, Any], where: str) -> Compared | None:
    """What the row compares; None if it is in another layout. A UserError if the preference names neither response."""
    names = {name.lower(): name for name in row}
    responses = _responses(row, names)
    which = next((names[name] for name in _WHICH if name in names), None)
    if responses is None or which is None:
        return None
    if row[which] is None or str(row[which]).lower().startswith("tie") or row[which] == "":
        one, other = [*responses.values()][:2]
        return Compared(one, other, is_tie=True)
    better = _label(row, which, responses, where)
    if len(responses) == 2:
        worse = next(label for label in responses if label != better)
    else:
        worse = _label(row, "rejected", responses, where)
    return Compared(responses[better], responses[worse], is_tie=False)


def _responses(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any] | None:
    """Label -> response: at least two of them."""
    for one in _LISTS:
        value = row[names[one]] if one in names else None
        if isinstance(value, list) and len(value) > 1:
            return {str(number): response for number, response in enumerate(value)}
    for stem in _STEMS:
        for ends in _ENDS:
            if all(f"{stem}_{end}" in names for end in ends):
                return {end: row[names[f"{stem}_{end}"]] for end in ends}
    return None


def _label(row: Mapping[str, Any], which: str, responses: Mapping[str, Any], where: str) -> str:
    found = _NAMED.fullmatch(str(row.get(which)).strip().lower())
    if found is None or found[1] not in responses:
        raise UserError(
            f"{where}: field '{which}': expected which response it is, {', '.join(responses)}, "
            f"found {one_line(str(row.get(which)))!r}"
        )
    return found[1]
