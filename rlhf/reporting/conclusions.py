"""Sentences on a run's results, by stated rules: did PPO help, did the KL stay in its band, and is the gain real?"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.file_types import EndingEffect, Evaluation, GainAtEqualLength, GoldGain, PairedGain, Validity
from rlhf.reporting.values import KL_BAND, NAMES, Record, is_number, series, share_inside

METHODS = {"full": "PPO on all weights (full)", "lora": "PPO with LoRA"}

TRUNCATED = 0.5  # from this share of truncated responses on, the length limit is worth a sentence

VERDICT_RULES = (
    "A gain is shown if its interval excludes 0, and confirmed if the interval of the second reward model's gain is "
    "above 0, too."
)


@dataclass(frozen=True)
class Verdict:
    """Did PPO help? The same words on the report's page and on the console."""

    headline: str  # one sentence on all policies, without figures
    words: dict[str, str]  # policy -> a few words for a table
    sentences: list[str]  # one for each policy, with figures
    advice: list[str]  # what the prompts can show, and what to change first; empty if every gain is confirmed


def verdict(evaluation: Evaluation) -> Verdict | None:
    """The verdict on all policies of evaluation.json; None without a gain that has an interval, and for one prompt."""
    if evaluation.get("n_prompts") == 1:  # it says nothing of others, and its interval has no width
        return None
    gains = {name: gain for name, gain in evaluation.get("gains", {}).items() if gain and _ends_of(gain)}
    if not gains:
        return None
    judges = {name: (gain, _second(evaluation, name)) for name, gain in gains.items()}
    kinds = {name: _kind(*both) for name, both in judges.items()}
    level = f"{evaluation.get('confidence', 0.95):.0%} interval"
    return Verdict(
        headline=_headline(kinds),
        words={name: _WORDS[kind] for name, kind in kinds.items()},
        sentences=[_sentence(name, *both, level) for name, both in judges.items()],
        advice=[*_power(evaluation, judges), *_ending(evaluation, kinds)],
    )


# What both reward models say -> words for a table, and for the headline after a policy's name.
_WORDS = {
    "confirmed": "gain, confirmed",
    "unconfirmed": "gain, not confirmed",
    "contradicted": "gain, contradicted",
    "unchecked": "gain, not checked",
    "none": "no gain shown",
    "loss": "loss",
}
_HEADLINES = {
    "confirmed": "a gain, confirmed by the second reward model",
    "unconfirmed": "a gain that the second reward model does not confirm",
    "contradicted": "a gain that the second reward model sees as a loss",
    "unchecked": "a gain, not checked by a second reward model",
    "none": "no gain shown",
    "loss": "a loss",
}


def _ends_of(record: Mapping[str, Any]) -> bool:
    return is_number(record.get("gain")) and bool(record.get("interval"))


def _second(evaluation: Evaluation, name: str) -> GoldGain | None:
    checks: Any = evaluation.get("validity", {}).get(name) or {}
    gold: GoldGain | None = checks.get("gold")
    return gold if gold and _ends_of(gold) else None


def _kind(proxy: PairedGain, gold: GoldGain | None) -> str:
    first = _direction(proxy)
    if first != "rose":
        return "loss" if first == "fell" else "none"
    if gold is None:
        return "unchecked"
    return {"rose": "confirmed", "fell": "contradicted"}.get(_direction(gold), "unconfirmed")


def _headline(kinds: Mapping[str, str]) -> str:
    found = list(kinds.values())
    names = [NAMES.get(name, name) for name in kinds]
    if len(found) > 1 and len(set(found)) == 1:
        return f"{_capital(' and '.join(names))}: {_HEADLINES[found[0]]}."
    parts = [f"{_capital(name)}: {_HEADLINES[kind]}." for name, kind in zip(names, found, strict=True)]
    return " ".join(parts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(name: str, proxy: PairedGain, gold: GoldGain | None, level: str) -> str:
    first = _direction(proxy)
    figures = f"{proxy['gain']:+.3f} ({level} {_ends(proxy['interval'])})"
    said = {
        "rose": f"raised the mean reward by {figures}",
        "fell": f"lowered the mean reward by {figures}",
    }.get(first, f"shows no gain in mean reward beyond noise, {figures}")
    who = METHODS.get(name, name)
    if gold is None:
        return f"{who} {said}; no second reward model scored the responses."
    second = _direction(gold)
    agrees = {
        ("rose", "rose"): ", and the second reward model, trained on other pairs, confirms it",
        ("rose", "fell"): ", but the second reward model, trained on other pairs, sees a loss",
        ("rose", "flat"): ", but the second reward model, trained on other pairs, does not confirm it",
        ("fell", "fell"): ", and the second reward model sees a loss, too",
        ("flat", "flat"): "; nor does the second reward model",
        ("flat", "rose"): ", though the second reward model sees one",
        ("flat", "fell"): ", and the second reward model sees a loss",
    }
    flat = {"did not move beyond noise": "flat"}
    both = flat.get(first, first), flat.get(second, second)
    joined = agrees.get(both, ", but the second reward model does not")
    return f"{who} {said}{joined}: {_gain(gold)}."


def _power(evaluation: Evaluation, judges: Mapping[str, tuple[PairedGain, GoldGain | None]]) -> Iterator[str]:
    """What so many prompts can show, for each policy: of the first judge that shows no gain."""
    for name, (proxy, gold) in judges.items():
        rose = _direction(proxy) == "rose"
        record, judge = (gold, " by the second reward model") if rose else (proxy, "")
        if record is None or _direction(record) in ("rose", "fell"):
            continue
        least = record.get("detectable")
        if not is_number(least):
            continue
        who, prompts = _capital(NAMES.get(name, name)), f"{evaluation.get('n_prompts', 0):,} prompts"
        if least == 0:  # and no gain: no prompt's score has changed
            yield f"{who}: the responses to all {prompts} score exactly as before{judge}."
            continue
        needed = record.get("prompts_needed")
        more = f"; {record['gain']:+.3f} would need about {_rounded(needed):,}" if needed else ""
        yield (f"{who}: {prompts} can show a gain of {_amount(least)}{judge} (80% power){more}.")


def _amount(gain: float) -> str:
    return f"{gain:.2f}" if gain >= 0.005 else "less than 0.01"


def _rounded(count: int) -> int:
    """A count with two digits: a number of prompts that is worked out from a noisy spread is not known better."""
    return round(count, min(0, 2 - len(str(count))))


def _ending(evaluation: Evaluation, kinds: Mapping[str, str]) -> Iterator[str]:
    """That truncation costs reward, if the numbers show it and a policy without a gain is mostly truncated."""
    effect: EndingEffect | None = evaluation.get("ending")
    models: Mapping[str, Any] = evaluation.get("models", {})
    rates = {name: (models.get(name) or {}).get("eos_rate") for name, kind in kinds.items() if kind in ("none", "loss")}
    cut = {name: 1 - rate for name, rate in rates.items() if is_number(rate) and 1 - rate >= TRUNCATED}
    if not cut or not effect or effect["interval"][0] <= 0:
        return
    shares = " and ".join(f"{share:.0%} of {NAMES.get(name, name)}'s" for name, share in cut.items())
    yield (
        f"Responses that end score {effect['difference']:.1f} higher than truncated ones of the same model "
        f"({_ends(effect['interval'])}; {effect['ended']:,} ended, {effect['truncated']:,} truncated), and {shares} "
        "are truncated: change the length limit before the learning rate."
    )


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


def score_conclusion(rows: Sequence[Record], gain: float | None) -> str | None:
    """A sentence if the scores of PPO's samples moved one way and the evaluation's gain the other; None otherwise.

    rows: of metrics.jsonl. The first and the last quarter of the steps are compared, at least one step each.
    """
    _, values = series(rows, "objective/scores")
    if len(values) < 2 or gain is None:
        return None
    part = max(1, len(values) // 4)
    before, after = (math.fsum(some) / part for some in (values[:part], values[-part:]))
    if (after - before) * gain >= 0:
        return None
    first, second = ("fell", "rose") if after < before else ("rose", "fell")
    return (
        f"the score {first} during training ({before:.3f} to {after:.3f}) and {second} in the evaluation "
        f"({gain:+.3f}). Each "
        "step of training scores a few responses to other prompts, sampled at the training temperature; the "
        "evaluation "
        "compares both models on the same unseen prompts, so it decides"
    )


REPETITION = 0.1  # most that repetition may rise above the base model's

VARIETY = 0.7  # least distinct-2, as a share of the base model's

SHARE = 0.2  # from this share of empty or identical responses on, responses are degenerate

GAIN_RULES = (
    "A reward rose or fell if the interval of its gain excludes 0. Length explains a gain if the interval of the gain "
    "at equal length includes 0 and the interval of the slope does not. Responses are degenerate if "
    "repetition is more "
    f"than {REPETITION:g} above the base model's, if distinct-2 is below {VARIETY:.0%} of the base model's, or if at "
    f"least {SHARE:.0%} of the responses are empty or identical."
)


def gain_conclusions(evaluation: Evaluation, model: str) -> list[str]:
    """Sentences on the gain of a tuned model, from evaluation.json; an empty list without a gain or its checks."""
    gain = evaluation.get("gains", {}).get(model)
    checks = evaluation.get("validity", {}).get(model)
    models = evaluation.get("models", {})
    if not gain or "interval" not in gain or not checks or evaluation.get("n_prompts") == 1:
        return []
    said = [_gold(gain, checks.get("gold"), checks.get("agreement"))]
    said += _length(gain, checks.get("length"))
    said += _degenerate(models.get("base") or {}, models.get(model) or {}, checks)
    return said


def _direction(record: Mapping[str, Any]) -> str:
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
