"""How the numbers are computed, with examples from the run: sums that a reader can check."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.reporting.run import Run
from rlhf.reporting.samples import numbered
from rlhf.reporting.values import NAMES, is_number
from rlhf.storage.stages import POLICIES

_MOST_DIGITS = 9
_FLOAT32 = 2.0**-22  # two roundings of float32, relative: metrics are summed in it


@dataclass(frozen=True)
class Example:
    """One sum: `left`, of numbers with + - × / and brackets, is `right`."""

    about: str  # what is computed, and of what
    left: str
    right: str


def examples(run: Run) -> list[Example]:
    """Every example for which the run has numbers, the reward of PPO's last step first."""
    found = [example for name, rows in run.ppo.items() for example in ppo_examples(run, name, rows[-1])]
    return [*found, *_accuracy(run), *_gain(run)]


def ppo_examples(run: Run, name: str, row: Mapping[str, Any]) -> Iterator[Example]:
    """From the rewards' means to objective/rlhf_reward, on one row of metrics.jsonl."""
    config: Mapping[str, Any] = run.stages.get(POLICIES.get(name, ""), {}).get("config", {})
    where = f"{NAMES.get(name, name)}, step {row.get('step')}"
    yield from _weighted(row, config, where)
    yield from _penalised(row, config, where)
    kl = [row.get(f"objective/{key}") for key in ("kl_coef", "kl", "non_score_reward")]
    yield from _example(
        f"KL penalty ({where}): minus coefficient times KL", "-{} × {}", lambda a, b: -a * b, kl[:2], kl[2]
    )
    parts = [row.get(f"objective/{key}") for key in ("penalised_scores", "non_score_reward")]
    about = f"Reward of a response, objective/rlhf_reward ({where}): penalised score plus KL penalty"
    yield from _example(about, "{} + {}", lambda a, b: a + b, parts, row.get("objective/rlhf_reward"))


def _weighted(row: Mapping[str, Any], config: Mapping[str, Any], where: str) -> Iterator[Example]:
    """The score of several rewards; left out where one of them does not score every response."""
    means = [value for key, value in row.items() if key.startswith("rewards/") and key.endswith("/mean")]
    weights = config.get("reward_weights") or [1.0] * len(means)
    if len(means) < 2 or len(weights) != len(means):
        return
    form = " + ".join(["{} × {}"] * len(means))
    values = [value for pair in zip(weights, means, strict=True) for value in pair]
    about = f"Score, objective/scores ({where}): each reward's mean times its weight"

    def rule(*both: float) -> float:
        return sum(a * b for a, b in zip(both[::2], both[1::2], strict=True))

    yield from _example(about, form, rule, values, row.get("objective/scores"))


def _penalised(row: Mapping[str, Any], config: Mapping[str, Any], where: str) -> Iterator[Example]:
    """What PPO learns from: with scaling or clipping, which work response by response, only the penalty is a sum."""
    penalty, score, ended = (
        config.get("missing_eos_penalty"),
        row.get("objective/scores"),
        row.get("objective/eos_rate"),
    )
    learned = row.get("objective/penalised_scores")
    rescaled = (
        config.get("score_norm_samples") or config.get("use_score_scaling") or config.get("score_clip") is not None
    )
    if not is_number(penalty) or not is_number(learned) or not is_number(ended):
        return
    about = f"Penalised score ({where}): score less missing_eos_penalty times the share of truncated responses"
    if rescaled:
        about = about.replace("score less", "score, scaled and clipped response by response, less")
        score = learned + penalty * (1 - ended)
    yield from _example(about, "{} - {} × (1 - {})", lambda a, b, c: a - b * (1 - c), [score, penalty, ended], learned)


def _accuracy(run: Run) -> Iterator[Example]:
    matrix = run.reward.get("confusion_matrix") or []
    after: Any = run.reward.get("after") or {}
    if len(matrix) == 2:
        (a, b), (c, d) = matrix
        about = "Accuracy of the reward model: pairs in which it agrees with the data, divided by all pairs"
        yield from _example(
            about, "({} + {}) / {}", lambda x, y, z: (x + y) / z, [a, d, a + b + c + d], after.get("accuracy")
        )


def _gain(run: Run) -> Iterator[Example]:
    """The gain on the first prompt that has scores of the base and of a tuned model, and the mean gain."""
    for number, answers in numbered(run.responses):
        scores = {name: row.get("score") for name, row in answers.items()}
        tuned = next((name for name in scores if name != "base"), "")
        before, after = scores.get("base"), scores.get(tuned)
        if tuned and is_number(before) and is_number(after):
            about = f"Gain on prompt {number} ({NAMES.get(tuned, tuned)}): score after minus score before"
            yield from _example(about, "{} - {}", lambda x, y: x - y, [after, before], after - before)
            break
    for name, gain in run.evaluation.get("gains", {}).items():
        record: Mapping[str, Any] = gain or {}
        about = f"Gain ({NAMES.get(name, name)}): mean score after minus mean score before"
        yield from _example(
            about, "{} - {}", lambda x, y: x - y, [record.get("after"), record.get("before")], record.get("gain")
        )


def _example(about: str, form: str, rule: Callable[..., float], values: Sequence[Any], total: Any) -> Iterator[Example]:
    """The sum with the fewest digits, three at least, with which the numbers as shown give the total as shown.

    form: the sum with {} for each value; rule: what it comes to. Nothing if a number is missing, or if the values do
    not give the total at all.
    """
    if not is_number(total) or not all(is_number(value) for value in values):
        return
    for digits in range(_least(*values, total), _MOST_DIGITS + 1):
        shown = [_rounded(value, digits) for value in values]
        found = rule(*shown)
        # Or the sum as shown differs from the total by less than half a digit and what float32 rounds off.
        near = abs(found - total) <= 0.5 * 10.0**-digits + _FLOAT32 * max(map(abs, (*values, total)))
        if near or round(found, digits) == round(total, digits):
            texts = [f"({_text(value, digits)})" if value < 0 else _text(value, digits) for value in shown]
            yield Example(about, form.format(*texts), _text(_rounded(found, digits), digits))
            return


def _least(*values: float) -> int:
    """Digits after the point with which every number shows two that count; three at least."""
    return max([3, *(1 - math.floor(math.log10(abs(value))) for value in values if value)])


def _rounded(value: float, digits: int) -> float:
    return float(round(value, digits))


def _text(value: float, digits: int) -> str:
    """A number with so many digits, a whole one with none."""
    return f"{int(value)}" if float(value).is_integer() else f"{value:.{digits}f}"
