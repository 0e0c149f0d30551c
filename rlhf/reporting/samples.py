"""Which responses the report shows: by stated rules, never by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.file_types import ResponseRow
from rlhf.reporting.values import is_number

Answers = Mapping[str, ResponseRow]  # model -> its response to one prompt

N_FIRST, N_MORE = 5, 6  # prompts on the first screen, and in the evaluation's section

FIRST_RULE = (
    "Prompts in the order of the policies' mean gain under PPO's reward model; shown are those at one, three, five, "
    "seven and nine tenths of that order, so the first samples are where PPO helped least."
)
MORE_RULE = "Evenly spaced in the order of evaluation; scores play no part in the choice."


def numbered(responses: Sequence[ResponseRow]) -> list[tuple[int, dict[str, ResponseRow]]]:
    """(number, answers) of each prompt, numbered from 1 in the file's order.

    If a prompt and model occur twice (a stage that was rerun), the later row counts.
    """
    prompts: dict[str, dict[str, ResponseRow]] = {}
    for row in responses:
        prompts.setdefault(str(row.get("prompt_id")), {})[str(row.get("model"))] = row
    return list(enumerate(prompts.values(), start=1))


def first_samples(responses: Sequence[ResponseRow]) -> list[tuple[int, dict[str, ResponseRow]]]:
    """The five prompts of FIRST_RULE; fewer if fewer have scores of the base and of a policy."""
    ordered = [
        (gain, number, answers) for number, answers in numbered(responses) if (gain := _gain(answers)) is not None
    ]
    ordered.sort(key=lambda found: found[:2])
    places = dict.fromkeys((len(ordered) - 1) * part // 10 for part in (1, 3, 5, 7, 9)) if ordered else {}
    return [ordered[place][1:] for place in places]


def more_samples(responses: Sequence[ResponseRow], count: int = N_MORE) -> list[tuple[int, dict[str, ResponseRow]]]:
    """Up to count prompts, evenly spaced in the file's order."""
    found = numbered(responses)
    shown = min(count, len(found))
    return [found[i * len(found) // shown] for i in range(shown)]


def _gain(answers: Mapping[str, Any]) -> float | None:
    """The policies' mean gain over the base model on one prompt; None without scores of both."""
    scores = {name: row.get("score") for name, row in answers.items()}
    tuned = [score for name, score in scores.items() if name != "base" and is_number(score)]
    base = scores.get("base")
    return sum(tuned) / len(tuned) - base if tuned and is_number(base) else None
