"""Is the gain real? What the evaluation says about it, in words, by stated rules."""

import math
from collections.abc import Sequence
from typing import Any

from rlhf.file_types import Evaluation, GainAtEqualLength, GoldGain, PairedGain, Validity
from rlhf.reporting.plots.training import KL_BAND, Record, series, share_inside

KL_RULES = (
    "The last quarter of the steps decides, at least four of them: its mean KL per response token below the band is "
    "too low to learn much, inside it moderate, above it growing too fast."
)


def last_quarter(values: Sequence[float]) -> Sequence[float]:
    """The last quarter of values, at least four of them where there are as many."""
    return values[-max(4, len(values) // 4) :]


def interpret(rows: Sequence[Record], band: tuple[float, float] = KL_BAND) -> str | None:
    """A sentence on objective/kl_per_token over the PPO steps (rows of metrics.jsonl); None without a value."""
    _, values = series(rows, "objective/kl_per_token")
    if not values:
        return None
    last = last_quarter(values)
    mean = math.fsum(last) / len(last)
    kind = "too low to learn much" if mean < band[0] else "moderate" if mean <= band[1] else "growing too fast"
    advice = {
        "too low to learn much": "; a higher learning rate, more steps or a lower KL coefficient would let it move",
        "growing too fast": "; a lower learning rate or a higher KL coefficient would hold it, and samples need a look",
    }.get(kind, "")
    above = sum(value > band[1] for value in values)
    peak = f"; {above} of {len(values)} steps were above the band, at most {max(values):.3f}" if above else ""
    return (
        f"{kind}: {mean:.3f} nats a token over the last {len(last)} steps, "
        f"{share_inside(values, band):.0%} of all steps inside {band[0]} to {band[1]}{peak}{advice}"
    )


REPETITION = 0.1  # more than the base's

VARIETY = 0.7  # of the base's distinct-2

SHARE = 0.2  # of all responses, that are empty or the same

VERDICT_RULES = (
    "A reward rose or fell when the interval of its gain excludes 0. Length explains a gain when the interval of "
    "what is left of it at equal length includes 0 and the interval of its slope does not. Responses degenerate when "
    f"repetition is more than {REPETITION:g} above the base model's, distinct-2 below {VARIETY:.0%} of it, or at least "
    f"{SHARE:.0%} of the responses are empty or the same."
)


def verdict(evaluation: Evaluation, model: str) -> list[str]:
    """Sentences on the gain of a tuned model, from evaluation.json; none where it has nothing to say."""
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
        return "No second reward model judged the responses, so that nothing but the proxy speaks for this gain."
    first, second = _direction(proxy), _direction(gold)
    figures = f"proxy {_gain(proxy)}, gold {_gain(gold)}"
    if agreement is not None:
        figures += f"; their differences agree with a rank correlation of {agreement:.2f}"
    if first == second == "rose":
        return (
            "The proxy rose, and so did the gold model, which was trained on other pairs: the gain is not the proxy's "
            f"alone ({figures})."
        )
    if first == "rose":
        return (
            f"The proxy rose, the gold model {second}: PPO may have learned what the proxy likes and not what the "
            f"preferences say (over-optimisation; {figures})."
        )
    return f"The proxy {first}; the gold model {second} ({figures})."


def _length(proxy: PairedGain, length: GainAtEqualLength | None) -> list[str]:
    if length is None or _direction(proxy) != "rose":
        return []
    left = f"{length['gain']:+.3f} ({_ends(length['interval'])}) is left at equal length"
    matters = length["slope_interval"][0] > 0 or length["slope_interval"][1] < 0
    if matters and _direction(length) != "rose":
        more = "longer" if length["mean_difference"] > 0 else "shorter"
        return [f"Length explains the gain: responses became {more}, and {left}."]
    return [f"Length alone does not explain the gain: {left}."]


def _degenerate(base: Record, tuned: Record, checks: Validity) -> list[str]:
    found = []
    repetition, before = tuned.get("repetition"), base.get("repetition")
    if repetition is not None and before is not None and repetition > before + REPETITION:
        found.append(f"repetition went from {before:.3f} to {repetition:.3f}")
    variety, before = tuned.get("distinct_2"), base.get("distinct_2")
    if variety is not None and before and variety < VARIETY * before:
        found.append(f"distinct-2 went from {before:.3f} to {variety:.3f}")
    shares = ((checks.get("empty", 0), "are empty"), (checks.get("same_response", 0), "are the same text"))
    found += [f"{share:.0%} {words}" for share, words in shares if share >= SHARE]
    return [f"Responses degenerate: {', '.join(found)}."] if found else []


def _gain(record: Record) -> str:
    return f"{record['gain']:+.3f} ({_ends(record['interval'])})"


def _ends(interval: Any) -> str:
    return f"{interval[0]:+.3f} to {interval[1]:+.3f}"
