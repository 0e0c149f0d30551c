"""Skipped updates: what is reported of each, after how many the run ends, and what the line says."""

import math

import pytest
import torch

from rlhf.errors import UserError
from rlhf.tracking.skipped_updates import Skips, json_number, names_of, skip_line


def rows(count, of="prompt"):
    return [{f"{of}_id": f"{of[0]}{n}"} for n in range(count)]


def test_a_run_ends_after_so_many_in_a_row_and_each_is_written():
    seen = []
    skips = Skips(3, seen.append)
    skips.report(4, ["loss"], rows(1), 0.5)
    skips.report(5, ["loss", "gradient"], rows(2), ["nan", 0.0])
    skips.in_a_row = 0  # one was taken
    skips.report(7, ["score"], rows(1))
    skips.report(8, ["score"], rows(1))
    with pytest.raises(UserError) as ended:
        skips.report(9, ["score", "loss"], rows(9))
    assert str(ended.value) == (
        "update: score and loss not finite 3 times in a row, last in step 9 with prompts "
        "p0, p1, p2, p3, p4, p5, p6, p7 and 1 more; check the rewards of these prompts; "
        "earlier checkpoints are intact"
    )
    assert [(one["step"], one["in_a_row"]) for one in seen] == [(4, 1), (5, 2), (7, 1), (8, 2), (9, 3)]
    assert seen[0] == {"step": 4, "not_finite": ["loss"], "in_a_row": 1, "rows": rows(1), "grad_norm": 0.5}
    assert seen[1]["grad_norm"] == ["nan", 0.0]
    assert "grad_norm" not in seen[2]
    with pytest.raises(UserError, match="try a lower learning_rate or bounded rewards"):
        Skips(1).report(1, ["gradient"], rows(1))
    with pytest.raises(UserError, match=r"loss and score not finite 1 times .*; check the rewards of these prompts"):
        Skips(1).report(1, ["loss", "score"], rows(1))


def test_a_gradient_of_0_is_written_too():
    seen = []
    Skips(9, seen.append).report(1, ["loss"], [], 0.0)
    assert seen[0]["grad_norm"] == 0.0


def test_pairs_are_named_as_pairs_and_have_hints_of_their_own():
    with pytest.raises(UserError, match="with pairs p0, p1; look at them; earlier"):
        Skips(1, of="pair", hints={"gradient": "look at them"}).report(1, ["loss"], rows(2, "pair"))
    update = {"step": 3, "not_finite": ["loss", "gradient"], "in_a_row": 1, "rows": rows(8, "pair")}
    assert skip_line(update, "pair") == (
        "step 3: update skipped: loss and gradient not finite, pairs p0, p1, p2, p3, p4, p5, p6, p7; see skipped.jsonl"
    )
    assert names_of(rows(9, "pair"), "pair").endswith("p7 and 1 more")
    assert skip_line(update | {"rows": rows(1)}) == (
        "step 3: update skipped: loss and gradient not finite, prompts p0; see skipped.jsonl"
    )


def test_only_scores_that_are_not_finite_are_named():
    row = {"prompt_id": "a", "scores": {"half": "inf", "whole": 0.5, "other": "nan"}}
    assert names_of([row, {"prompt_id": "b", "scores": {"half": 1.0}}]) == "prompts a (half inf, other nan), b"


@pytest.mark.parametrize(
    ("value", "found"),
    [(torch.tensor(0.5), 0.5), (math.inf, "inf"), (-math.inf, "-inf"), (torch.tensor(math.nan), "nan"), (0, 0.0)],
)
def test_numbers_are_as_json_can_hold_them(value, found):
    assert json_number(value) == found
