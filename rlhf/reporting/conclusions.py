"""Sentences for the report, by stated rules: did the KL stay in its band, and is the gain real?"""

import math
from collections.abc import Sequence
from typing import Any

from rlhf.file_types import Evaluation, GainAtEqualLength, GoldGain, PairedGain, Validity
from rlhf.reporting.plots.training import KL_BAND, Record, series, share_inside

KL_RULES = (
    "The mean KL per response token over the last quarter of the steps (at least four) decides: below the band it is "
    "too low to learn much, inside the band moderate, above the band growing too fast."
)


def last_quarter(values: Sequence[float]) -> Sequence[float]:
    """The last quarter of values, but at least the last four."""
    return values[-max(4, len(values) // 4) :]


def kl_conclusion(rows: Sequence[Record], band: tuple[float, float] = KL_BAND) -> str | None:
    """A sentence on objective/kl_per_token over the PPO steps (rows of metrics.jsonl); None if it was not logged."""
    _, values = series(rows, "objective/kl_per_token")
    if not values:
        return None
    last = last_quarter(values)
    mean = math.fsum(last) / len(last)
    kind = "too low to learn much" if mean < band[0] else "moderate" if mean <= band[1] else "growing too fast"
    advice = {
        "too low to learn much": "; try a higher learning rate, more steps or a lower KL coefficient",
        "growing too fast": "; try a lower learning rate or a higher KL coefficient, and read some samples",
    }.get(kind, "")
    above = sum(value > band[1] for value in values)
    peak = f"; {above} of {len(values)} steps were above the band, at most {max(values):.3f}" if above else ""
    return (
        f"{kind}: {mean:.3f} nats per token over the last {len(last)} steps, "
        f"{share_inside(values, band):.0%} of all steps inside {band[0]} to {band[1]}{peak}{advice}"
    )


REPETITION = 0.1  # most that repetition may rise above the base model's

VARIETY = 0.7  # least distinct-2, as a share of the base model's

SHARE = 0.2  # from this share of empty or identical responses on, responses are degenerate

GAIN_RULES = (
    "A reward rose or fell if the interval of its gain excludes 0. Length explains a gain if the interval of the gain "
    "at equal length includes 0 and the interval of the slope does not. Responses are degenerate if repetition is more "
    f"than {REPETITION:g} above the base model's, if distinct-2 is below {VARIETY:.0%} of the base model's, or if at "
    f"least {SHARE:.0%} of the responses are empty or identical."
)


def gain_conclusions(evaluation: Evaluation, model: str) -> list[str]:
    """Sentences on the gain of a tuned model, from evaluation.json; an empty list without a gain or its checks."""
    gain = evaluation.get("gains", {}).get(model)
    checks = evaluation.get("validity", {}).get(model)
    models = evaluation.get("models", {})
    if not gain or "interval" not in gain or not checks:
        return []
    said = [_gold(gain, checks.get("gold"), checks.get("agreement"))]
    said += _length(gain, checks.get("length"))
    said += _degenerate(models.get("base") or {}, models.get(model) or {}, checks)
    return said


def _direction(record: Record) -> str:
    low, high = record["interval"]
    return "rose" if low > 0 else "fell" if high < 0 else "did not move beyond noise"


def _gold(proxy: PairedGain, gold: GoldGain | None, agreement: float | None) -> str:
    if gold is None:
        return "No second reward model scored the responses: only the proxy supports this gain."
    first, second = _direction(proxy), _direction(gold)
    figures = f"proxy {_gain(proxy)}, gold {_gain(gold)}"
    if agreement is not None:
        figures += f"; their differences have a rank correlation of {agreement:.2f}"
    if first == second == "rose":
        return (
            "The proxy rose, and so did the gold model, which was trained on other pairs: the gain is not specific to "
            f"the proxy ({figures})."
        )
    if first == "rose":
        return (
            f"The proxy rose, but the gold model {second}: PPO may have learned what the proxy likes, not what people "
            f"prefer (over-optimisation; {figures})."
        )
    return f"The proxy {first}; the gold model {second} ({figures})."


def _length(proxy: PairedGain, length: GainAtEqualLength | None) -> list[str]:
    if length is None or _direction(proxy) != "rose":
        return []
    remains = f"at equal length it is {length['gain']:+.3f} ({_ends(length['interval'])})"
    matters = length["slope_interval"][0] > 0 or length["slope_interval"][1] < 0
    if matters and _direction(length) != "rose":
        more = "longer" if length["mean_difference"] > 0 else "shorter"
        return [f"Length explains the gain: responses became {more}, and {remains}."]
    return [f"Length alone does not explain the gain: {remains}."]


def _degenerate(base: Record, tuned: Record, checks: Validity) -> list[str]:
    found = []
    repetition, before = tuned.get("repetition"), base.get("repetition")
    if repetition is not None and before is not None and repetition > before + REPETITION:
        found.append(f"repetition went from {before:.3f} to {repetition:.3f}")
    variety, before = tuned.get("distinct_2"), base.get("distinct_2")
    if variety is not None and before and variety < VARIETY * before:
        found.append(f"distinct-2 went from {before:.3f} to {variety:.3f}")
    shares = ((checks.get("empty", 0), "are empty"), (checks.get("same_response", 0), "are identical"))
    found += [f"{share:.0%} {words}" for share, words in shares if share >= SHARE]
    return [f"Responses are degenerate: {', '.join(found)}."] if found else []


def _gain(record: Record) -> str:
    return f"{record['gain']:+.3f} ({_ends(record['interval'])})"


def _ends(interval: Any) -> str:
    return f"{interval[0]:+.3f} to {interval[1]:+.3f}"
