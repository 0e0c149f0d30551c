"""The comparison of rated models in sentences, by stated rules: no sentence claims more than its interval shows."""

from collections.abc import Iterator

from rlhf.file_types import Ratings

# Krippendorff 2004, "Content Analysis", p. 241: reliable from 0.8, tentative conclusions from 0.667.
RELIABLE, TENTATIVE = 0.8, 0.667


def in_words(result: Ratings) -> list[str]:
    """Sentences on differences, agreement, consistency and sample size; `result` as `analyse` has it."""
    return [*_differences(result), *_agreement(result), *_consistency(result), *_sample(result)]


def _differences(result: Ratings) -> Iterator[str]:
    n, raters, level = result["n_prompts"], len(result["raters"]), f"{result['confidence']:.0%}"
    for pair in result["pairs"]:
        low, high = pair["interval"]
        numbers = (
            f"{pair['difference']:+.2f} points, {level} interval {low:+.2f} to {high:+.2f}, p = {pair['p_value']:.3f}, "
            f"{n} prompts, raters: {raters}"
        )
        if n > 1 and low > 0:  # one prompt says nothing of others, and its interval has no width
            yield f"Raters gave {pair['of']} higher ratings than {pair['over']} ({numbers})."
        elif n > 1 and high < 0:
            yield f"Raters gave {pair['of']} lower ratings than {pair['over']} ({numbers})."
        else:
            names = f"{pair['of']} and {pair['over']}"
            yield f"The ratings show no difference between {names} beyond noise ({numbers})."


def _agreement(result: Ratings) -> Iterator[str]:
    if len(result["raters"]) < 2:
        yield "There was one rater: agreement between raters is unknown, and the ratings are one person's view."
        return
    titles = result["criteria"]
    groups: dict[str, list[str]] = {"reliable": [], "tentative": [], "unreliable": [], "constant": []}
    for name, alpha in result["agreement"].items():
        text = titles[name] if alpha is None else f"{titles[name]} {alpha:.2f}"
        if alpha is None:
            groups["constant"].append(text)
        else:
            kind = "reliable" if alpha >= RELIABLE else "tentative" if alpha >= TENTATIVE else "unreliable"
            groups[kind].append(text)
    words = {
        "reliable": f"Raters agree well (alpha of at least {RELIABLE}) on",
        "tentative": f"Agreement allows tentative conclusions only (alpha {TENTATIVE} to {RELIABLE}) on",
        "unreliable": f"Raters do not agree enough for a conclusion (alpha below {TENTATIVE}) on",
        "constant": "All ratings are equal, so agreement cannot be measured, on",
    }
    for kind, names in groups.items():
        if names:
            yield f"{words[kind]}: {', '.join(names)}."


def _consistency(result: Ratings) -> Iterator[str]:
    for rater, own in result["consistency"].items():
        yield (
            f"When asked again, {rater} gave the same rating in {own['same']:.0%} of {own['n']} cases, "
            f"{own['mean_difference']:.2f} points apart on average."
        )


def _sample(result: Ratings) -> Iterator[str]:
    n = result["n_prompts"]
    for pair in result["pairs"]:
        needed, names = pair["prompts_needed"], f"{pair['of']} and {pair['over']}"
        if needed is None:
            yield f"One prompt is not enough to estimate how many are needed to compare {names}."
        elif needed > n:
            yield (
                f"To detect a difference of 0.3 points between {names} (power 80%), {needed} prompts are needed, "
                f"{needed - n} more than were rated."
            )
        else:
            yield f"{n} prompts are enough to detect a difference of 0.3 points between {names} (power 80%: {needed})."
