"""What a run that goes wrong says, on rows worked by hand, and through the trainer."""

import json

import pytest
from test_rollout import config
from tiny_ppo import trainer

from rlhf.generation.decode import Samples
from rlhf.ppo.health import AGAIN, EXPLODED, HealthMonitor, warning_line

# A step that nothing is to be said of.
WELL = {
    "objective/kl_per_token": 0.03,
    "objective/entropy": 20.0,
    "objective/response_length": 10.0,
    "objective/eos_rate": 0.75,
    "objective/scores": 1.0,
    "objective/scores_std": 0.5,
    "val/all_responses_same": 0.0,
}


def said(rows, n=8, **options):
    """(step, kind, since) of every warning that rows, changes of WELL, lead to."""
    found = []
    watch = HealthMonitor(config(**options), found.append)
    for step, row in enumerate(rows, start=1):
        watch.check(step, WELL | row, n)
    return [(row["step"], row["kind"], row["since"]) for row in found]


def kls(*values):
    return [{"objective/kl_per_token": value} for value in values]


def kinds(folder):
    return {json.loads(text)["kind"] for text in (folder / "warnings.jsonl").read_text().splitlines()}


def two_points(completions, **_):
    return [2.0] * len(completions)


def test_a_run_that_is_well_is_quiet():
    assert said([{}] * 200) == []
    assert said(kls(0.0, 0.02, 0.05, 0.08, 0.09, -0.01, 0.1, 0.06)) == []


def test_kl_over_the_limit_is_said_at_once_and_again_when_twice_as_large():
    values = [0.02, 0.02, 0.4, 0.6, 0.7, 1.1, 1.3, 2.0]
    assert said(kls(*values)) == [(4, "kl_exploded", 4), (7, "kl_exploded", 4)]  # 1.3 is over 2 x 0.6


def test_the_limit_of_kl_is_five_times_a_larger_target():
    assert said(kls(0.9, 0.95, 1.05), kl_target=0.2) == [(3, "kl_exploded", 3)]


def test_kl_that_triples_within_five_steps():
    """Means over three steps: 0.04, 0.05, 0.07, 0.1, 0.13, 0.15; standard errors of the last two: 0.015, 0.006."""
    rising = kls(0.03, 0.04, 0.05, 0.06, 0.1, 0.14, 0.15, 0.16)
    assert said(rising) == [(8, "kl_jumped", 8)]  # 0.144 is over 3 x 0.04, 0.115 is not
    assert said(rising, kl_target=0.1) == []  # not over twice the target
    assert said(kls(0.01, 0.01, 0.01, 0.09, 0.09, 0.09)) == []  # ninefold, but within the band
    assert said(kls(*[0.04] * 3, *[0.07] * 7, *[0.099] * 3)) == []  # 0.04 is more than five steps ago


def test_kl_that_stays_above_the_band_is_said_although_it_does_not_rise():
    """A rate that is far too high: the first update alone leads out of the band, so no earlier mean was lower."""
    first = [0.0, 0.329, 0.296, 0.25, 0.221]
    assert said(kls(*first)) == [
        (5, "kl_high", 3)
    ]  # three times the mean less its error is over 0.1: 0.208 - 0.105, ...
    assert said(kls(*first[:4])) == []
    assert said(kls(*first), kl_target=0.15) == []
    assert said(kls(*[0.099] * 9)) == []
    assert said(kls(*[0.11] * (AGAIN + 5))) == [(5, "kl_high", 3), (5 + AGAIN, "kl_high", 3)]


def test_a_single_step_of_high_kl_is_noise():
    """However high, below kl_exploded: its mean with two of 0.02 is 0.18, with a standard error of 0.16."""
    for place in range(8):
        values = [0.02] * 8
        values[place] = 0.49
        assert said(kls(*values)) == []


def test_a_mean_that_may_be_below_the_limit_is_no_jump():
    """The last means are 0.101 and 0.102, of values that differ by more. Two steps of 0.2 after them are one."""
    full = [0.0, 0.011, 0.027, 0.03, 0.04, 0.064, 0.088, 0.076, 0.125, 0.101]
    lora = [0.0, 0.0, 0.024, 0.028, 0.039, 0.05, 0.042, 0.087, 0.1, 0.118]
    assert said(kls(*full)) == said(kls(*lora)) == []
    assert said(kls(*lora, 0.2, 0.2)) == [(12, "kl_jumped", 12)]
    assert said(kls(0.0, 0.043, 0.076, 0.354, 0.498)) == [(5, "kl_jumped", 5)]  # five steps that went wrong


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("all_empty", {"objective/response_length": 1.0, "objective/eos_rate": 1.0, "val/all_responses_same": 1.0}),
        ("all_cut", {"objective/eos_rate": 0.0}),
        ("all_same", {"val/all_responses_same": 1.0}),
        ("scores_flat", {"objective/scores_std": 0.0}),
        ("scores_flat", {"objective/scores": -40.0, "objective/scores_std": 3e-6}),  # rounding of 40 x 40
    ],
)
def test_what_collapsed_is_said_after_three_steps_in_a_row(kind, row):
    row = {"objective/entropy": 2.0 * row.get("objective/response_length", 10.0)} | row  # a token's stays
    assert said([{}, row, row, {}, row, row]) == []
    assert said([{}, row, row, row, row, {}, row, row, row]) == [(4, kind, 2)]
    assert said([row] * (AGAIN + 3)) == [(3, kind, 1), (3 + AGAIN, kind, 1)]


def test_one_response_a_step_has_no_spread_to_speak_of():
    assert said([{"objective/scores_std": 0.0}] * 9, n=1) == []


def test_entropy_is_held_against_the_first_three_steps():
    """2 nats per token at first; less than a tenth of it for three steps."""
    begin, low = [{}] * 4, {"objective/entropy": 1.9}
    assert said([*begin, *[{"objective/entropy": 2.1}] * 9]) == []
    assert said([*begin, low, low, low]) == [(7, "entropy_collapsed", 5)]
    shorter = {"objective/entropy": 5.0, "objective/response_length": 2.5}  # still 2 nats per token
    assert said([*begin, *[shorter] * 9]) == []


def test_a_step_with_nothing_finite_says_nothing():
    assert said([dict.fromkeys(WELL, 0.0)] * 9) == []


def test_scores_of_one_value_are_told_in_words_while_the_run_goes_on(tmp_path, capsys):
    trainer(tmp_path, reward=two_points, max_steps=6).train()
    rows = [json.loads(text) for text in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["kind"] == "scores_flat"]
    assert (row["step"], row["since"], row["seen"]) == (3, 1, "all scores are 2")
    assert f"! {warning_line(row)}" in capsys.readouterr().out.splitlines()
    assert warning_line(row).startswith("step 3: all scores are 2, since step 1; what usually helps: a reward that")


def test_a_run_that_goes_on_repeats_the_warnings_of_the_steps_it_repeats(tmp_path):
    options = {"reward": two_points, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, max_steps=4, **options).train()
    assert "scores_flat" in kinds(tmp_path)  # of step 3
    checkpoint = tmp_path / "checkpoints" / "step-2"
    trainer(tmp_path, max_steps=5, **options).train(resume_from_checkpoint=checkpoint)
    rows = [json.loads(text) for text in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert [(row["step"], row["since"]) for row in rows if row["kind"] == "scores_flat"] == [(3, 1)]


@pytest.mark.parametrize(
    ("response", "found"), [("eos", {"all_empty"}), ([9, 8, 7, 9, 8, 7], {"all_cut", "all_same"}), ("own", {"all_cut"})]
)
def test_responses_that_collapsed_are_seen_in_the_rollout(tmp_path, response, found):
    def by_place(completions, **_):
        return [float(i) for i in range(len(completions))]

    run = trainer(tmp_path, reward=by_place, max_steps=3, num_ppo_epochs=1, learning_rate=0.0)
    told = {"eos": [run.collector.eos_ids[0]], "own": None}.get(str(response), response)
    run.collector.sample = lambda prompts, *_, **__: Samples([told or [9 + i] * 6 for i, _ in enumerate(prompts)], [])
    run.train()
    assert kinds(tmp_path) == found


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_run_that_goes_on_warns_as_one_that_was_not_stopped(cut):
    rows = [WELL | row for row in kls(0.2, 0.3, 0.4, 0.6, 0.7, 1.1, 1.3, 2.0, 0.1)]
    rows = [row | {"objective/eos_rate": 0.0} for row in rows]
    whole, parts = [], []
    watch = HealthMonitor(config(), whole.append)
    for step, row in enumerate(rows, start=1):
        watch.check(step, row, 8)
    first, second = HealthMonitor(config(), parts.append), HealthMonitor(config(), parts.append)
    for step, row in enumerate(rows, start=1):
        if step == cut:
            second.load(json.loads(json.dumps(first.state())))
        (first if step < cut else second).check(step, row, 8)
    assert parts == whole
    assert len(whole) == 3  # KL twice, and what is cut


def test_answers_of_one_token_that_do_not_all_end_are_not_empty():
    one = {"objective/response_length": 1.0, "objective/entropy": 2.0}
    assert said([one | {"objective/eos_rate": 0.5}] * 5) == []
    found = said([one | {"objective/eos_rate": 0.0, "val/all_responses_same": 1.0}] * 3)
    assert found == [(3, "all_same", 1), (3, "all_cut", 1)]


def test_a_limit_that_is_just_met_is_not_passed():
    assert said(kls(0.0, EXPLODED)) == []
    assert said(kls(0.0, 0.6, 1.2)) == [(2, "kl_exploded", 2)]  # twice as large is not more than twice
    low = {"objective/entropy": 2.0}  # 0.2 nats per token, a tenth of those at first
    assert said([*[{}] * 4, *[low] * 4]) == []
    assert said([{"objective/scores_std": 0.0}] * 3, n=2) == [(3, "scores_flat", 1)]


@pytest.mark.parametrize("kind", ["kl_exploded", "kl_jumped"])
def test_what_rose_is_not_said_to_be_high_as_well(kind):
    values = {"kl_exploded": [0.02, 0.6], "kl_jumped": [0.03, 0.04, 0.05, 0.06, 0.1, 0.14, 0.15, 0.16]}[kind]
    assert [found[1] for found in said(kls(*values, *[0.3] * 20))] == [kind]
