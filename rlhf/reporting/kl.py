"""What a run's KL says, in words, by stated rules."""

import math
from collections.abc import Sequence

from rlhf.reporting.plots import KL_BAND, Record, series, share_inside

RULES = (
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
