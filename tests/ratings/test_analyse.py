"""What ratings say: means and comparisons worked by hand, and words that say no more than the numbers."""

import math
import random

import numpy as np
import pytest
import rating_sheets

from rlhf.evaluation.statistics import mean_interval, paired_p_value, prompts_needed
from rlhf.ratings.agreement import krippendorff_alpha
from rlhf.ratings.analyse import analyse
from rlhf.ratings.collect import check_sheet
from rlhf.ratings.scale import CRITERIA
from rlhf.ratings.words import in_words

KEY = rating_sheets.key(prompts=6, repeats=2)
MODELS = list(rating_sheets.MODELS)


def result(*values, key=KEY):
    sheets = [
        check_sheet(key, rating_sheets.filled(key, f"rater {i}", value, number=i), "test")
        for i, value in enumerate(values)
    ]
    return analyse(key, sheets, MODELS, 0.95, seed=0)


def by_model(base, full, lora):
    return lambda item, criterion: {"base": base, "full": full, "lora": lora}[item["model"]]


def test_means_by_hand():
    def value(item, criterion):
        return 5 if criterion == "coherence" else 2 + (item["prompt_id"] < "p3")

    models = result(value)["models"]
    for model in MODELS:
        assert models[model]["coherence"] == {"mean": 5.0, "interval": [5.0, 5.0]}
        assert models[model]["relevance"]["mean"] == pytest.approx(2.5)
        assert models[model]["overall"]["mean"] == pytest.approx((5 + 4 * 2.5) / 5)


def test_differences_and_preferences():
    pairs = {(p["of"], p["over"]): p for p in result(by_model(2, 4, 2), by_model(3, 4, 2))["pairs"]}
    assert set(pairs) == {("full", "base"), ("lora", "base"), ("lora", "full")}
    pair = pairs["full", "base"]
    assert (pair["difference"], pair["interval"], pair["preference"]) == (1.5, [1.5, 1.5], 1.0)
    assert (pair["wins"], pair["ties"], pair["losses"]) == (12, 0, 0)
    assert pair["p_value"] == pytest.approx(2 / 64)  # of the 2^6 flips of equal differences
    pair = pairs["lora", "base"]
    assert (pair["wins"], pair["ties"], pair["losses"], pair["preference"]) == (0, 6, 6, 0.25)


def test_each_figure_is_of_its_own_model_criterion_and_rater_and_at_the_asked_confidence():
    key, draw = rating_sheets.key(prompts=15, repeats=3), random.Random(1)
    given = [rating_sheets.filled(key, name, lambda *_: draw.randint(1, 5), n) for n, name in enumerate("ABC", 1)]
    found = analyse(key, [check_sheet(key, one, "test") for one in given], MODELS, 0.8, seed=5)

    def ratings(sheet, item):
        return list(sheet["items"][item["item_id"]]["ratings"].values())

    first = {(item["prompt_id"], item["model"]): item for item in key["items"] if not item["repeat"]}
    prompts = list(dict.fromkeys(prompt for prompt, _ in first))
    x = np.array([[[ratings(sheet, first[p, m]) for m in MODELS] for p in prompts] for sheet in given], float)

    def near(value):
        return pytest.approx(value, abs=1e-12)

    for m, model in enumerate(MODELS):
        columns = {"overall": x[:, :, m].mean((0, 2))} | dict(zip(CRITERIA, x[:, :, m].mean(0).T, strict=True))
        assert found["models"][model].keys() == columns.keys()
        for name, column in columns.items():
            assert found["models"][model][name]["mean"] == near(column.mean())
            assert found["models"][model][name]["interval"] == near(mean_interval(column, 0.8, 5)[1])
    overall = x.mean(3)
    for pair, (a, b) in zip(found["pairs"], ((0, 1), (0, 2), (1, 2)), strict=True):
        assert (pair["of"], pair["over"]) == (MODELS[b], MODELS[a])
        y = overall[:, :, b] - overall[:, :, a]
        preferred = ((y > 0) + (y == 0) / 2).mean(0)
        assert (pair["wins"], pair["ties"], pair["losses"]) == ((y > 0).sum(), (y == 0).sum(), (y < 0).sum())
        assert (pair["preference"], pair["difference"]) == near((preferred.mean(), y.mean()))
        assert pair["preference_interval"] == near(mean_interval(preferred, 0.8, 5)[1])
        assert pair["interval"] == near(mean_interval(y.mean(0), 0.8, 5)[1])
        assert pair["p_value"] == near(paired_p_value(y.mean(0), 5))
        assert pair["prompts_needed"] == prompts_needed(y.mean(0), 0.8, 0.3)
    for c, name in enumerate(CRITERIA):
        assert found["agreement"][name] == near(krippendorff_alpha(x[:, :, :, c].reshape(3, -1)))
    assert any("80% interval" in sentence for sentence in found["words"])
    again = [item for item in key["items"] if item["repeat"]]
    for sheet in given:
        apart = [np.subtract(ratings(sheet, i), ratings(sheet, first[i["prompt_id"], i["model"]])) for i in again]
        expected = {"n": 3 * 3 * 5, "same": np.mean(np.equal(apart, 0)), "mean_difference": np.abs(apart).mean()}
        assert found["consistency"][sheet["rater"]] == near(expected)


def test_repeats_count_for_consistency_only():
    def value(item, criterion):
        return 5 if item["repeat"] else 3

    found = result(value)
    assert found["models"]["base"]["overall"]["mean"] == 3
    assert found["consistency"] == {"rater 0": {"n": 2 * 3 * 5, "same": 0.0, "mean_difference": 2.0}}


def test_agreement_is_that_of_the_raters():
    same = result(*[lambda item, criterion: 1 + (ord(item["prompt_id"][1]) + len(item["model"])) % 5] * 2)
    assert set(same["agreement"].values()) == {1.0}
    assert any("agree well" in sentence for sentence in same["words"])
    opposite = result(by_model(1, 5, 1), by_model(5, 1, 5))
    assert all(alpha < 0 for alpha in opposite["agreement"].values())
    assert any("do not agree enough" in sentence for sentence in opposite["words"])


def test_incomplete_sheets_are_named_and_left_out():
    sheets = [check_sheet(KEY, rating_sheets.filled(KEY, "Ann", 4), "test")]
    half = check_sheet(KEY, rating_sheets.filled(KEY, "Bob", 1, number=2), "test")
    half["items"][KEY["items"][0]["item_id"]]["ratings"].pop("coherence")
    found = analyse(KEY, [*sheets, half | {"complete": False}], MODELS, 0.95, 0)
    assert (found["raters"], found["incomplete"]) == (["Ann"], ["Bob"])
    assert found["models"]["base"]["overall"]["mean"] == 4
    assert found["n_prompts"] == 6
    half["items"][KEY["items"][0]["item_id"]]["note"] = "unsure"
    found = analyse(KEY, [*sheets, half | {"complete": False}], MODELS, 0.95, 0)
    assert [note["rater"] for note in found["notes"]] == ["Bob"]  # what somebody wrote is read all the same


def test_without_a_complete_sheet_nothing_is_said():
    found = analyse(KEY, [], MODELS, 0.95, 0)
    assert "models" not in found
    assert found["words"] == ["There is no complete rating sheet yet, so the responses cannot be compared."]


def test_words_follow_the_intervals():
    words = result(by_model(2, 4, 2))["words"]
    assert any(s.startswith("Raters gave full higher ratings than base (+2.00 points") for s in words)
    assert any(s.startswith("Raters gave lora lower ratings than full (-2.00 points") for s in words)
    assert any(s.startswith("The ratings show no difference between lora and base") for s in words)
    assert any("one rater" in s for s in words)


def test_one_prompt_shows_no_difference():
    words = result(by_model(2, 4, 2), key=rating_sheets.key(prompts=1, repeats=0))["words"]
    assert not any("higher" in s or "lower" in s for s in words)
    assert any(s.startswith("The ratings show no difference between full and base beyond noise (+2.00") for s in words)


def test_notes_go_with_their_model():
    record = rating_sheets.filled(KEY, "Ann")
    item = KEY["items"][3]
    record["items"][item["item_id"]]["note"] = " too long "
    found = analyse(KEY, [check_sheet(KEY, record, "test")], MODELS, 0.95, 0)
    expected = {"prompt_id": item["prompt_id"], "model": item["model"], "rater": "Ann", "note": "too long"}
    assert found["notes"] == [expected]


def test_sample_size_by_hand():
    # s = 1: ((1.959964 + 0.841621) * 1 / 0.3)^2 = 87.2
    differences = np.array([-1.0, 1.0] * 3) * math.sqrt(5 / 6)
    assert np.std(differences, ddof=1) == pytest.approx(1)
    assert prompts_needed(differences, 0.95, 0.3) == 88

    def value(item, criterion):  # full over base: 1 and -1 in turn, s^2 = 6 / 5: 104.7
        return 3 + (item["model"] == "full") * (1 if item["prompt_id"] in ("p0", "p2", "p4") else -1)

    pairs = {(p["of"], p["over"]): p for p in result(value)["pairs"]}
    assert pairs["full", "base"]["prompts_needed"] == 105

    # Of two raters one gives 2 more, or as much, and one as much, or 2 less: their means on the prompts are the same.
    def up(item, criterion):
        return 3 + (item["model"] == "full") * (2 if item["prompt_id"] in ("p0", "p2", "p4") else 0)

    def down(item, criterion):
        return 3 - (item["model"] == "full") * (0 if item["prompt_id"] in ("p0", "p2", "p4") else 2)

    pairs = {(p["of"], p["over"]): p for p in result(up, down)["pairs"]}
    assert pairs["full", "base"]["prompts_needed"] == 105


def test_prompts_are_resampled_and_not_ratings():
    """On each prompt one rater prefers full and one base: every sample of prompts says one half."""
    pairs = {(p["of"], p["over"]): p for p in result(by_model(2, 4, 3), by_model(4, 2, 3))["pairs"]}
    pair = pairs["full", "base"]
    assert (pair["preference"], pair["preference_interval"]) == (0.5, [0.5, 0.5])
    assert (pair["difference"], pair["interval"], pair["p_value"]) == (0.0, [0.0, 0.0], 1.0)


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (None, "One prompt is not enough"),
        (87, "88 prompts are enough to detect a difference of 0.3 points between b and a (power 80%: 87)."),
        (88, "88 prompts are enough"),
        (89, "To detect a difference of 0.3 points between b and a (power 80%), 89 prompts are needed, 1 more than"),
    ],
)
def test_words_on_how_many_prompts_are_needed(needed, words):
    pair = {"of": "b", "over": "a", "difference": 0.1, "interval": [-0.1, 0.3], "p_value": 0.4}
    pair["prompts_needed"] = needed
    said = in_words(summary(pairs=[pair], n_prompts=88))
    assert sum(sentence.startswith(words) for sentence in said) == 1


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        (0.8, "Raters agree well"),
        (0.799, "Agreement allows tentative conclusions only"),
        (0.667, "Agreement allows tentative conclusions only"),
        (0.666, "Raters do not agree enough"),
        (None, "All ratings are equal"),
    ],
)
def test_words_on_agreement_change_at_krippendorffs_limits(alpha, words):
    said = in_words(summary(raters=["A", "B"], agreement={"coherence": alpha}))
    assert [sentence.startswith(words) for sentence in said] == [True]


def summary(**facts):
    """What `in_words` reads, of nothing."""
    empty = {"n_prompts": 8, "raters": ["A"], "confidence": 0.95, "criteria": {"coherence": "Coherence"}}
    return empty | {"pairs": [], "agreement": {}, "consistency": {}} | facts
