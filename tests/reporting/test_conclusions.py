"""The words on whether a gain is real follow the stated rules."""

import pytest

from rlhf.reporting.conclusions import GAIN_RULES, gain_conclusions, score_conclusion, verdict

ROSE, FLAT, FELL = [0.2, 0.8], [-0.2, 0.4], [-0.8, -0.2]
SLOPE = {"mean_difference": 12.0, "slope": 0.05, "slope_interval": [0.02, 0.08]}
PLAIN = {"repetition": 0.02, "distinct_2": 0.9}


def evaluation(proxy=ROSE, gold=None, length=None, tuned=PLAIN, **checks):
    if gold is not None:
        checks |= {"gold": {"gain": sum(gold) / 2, "interval": gold}, "agreement": 0.25}
    checks |= {"length": length}
    return {
        "models": {"base": PLAIN, "full": tuned},
        "gains": {"full": {"gain": sum(proxy) / 2, "interval": proxy}},
        "validity": {"full": {"same_response": 0.02, "empty": 0.0, **checks}},
    }


def said(**kinds):
    return " ".join(gain_conclusions(evaluation(**kinds), "full"))


@pytest.mark.parametrize(
    ("proxy", "gold", "words"),
    [
        (ROSE, ROSE, "The proxy rose, and so did the gold model"),
        (
            ROSE,
            FLAT,
            "The proxy rose, but the gold model did not move beyond noise: PPO may have",
        ),
        (ROSE, FELL, "The proxy rose, but the gold model fell: PPO may"),
        (FLAT, ROSE, "The proxy did not move beyond noise; the gold model rose"),
        (FELL, FELL, "The proxy fell; the gold model fell"),
        (ROSE, None, "No second reward model scored"),
    ],
)
def test_proxy_against_gold(proxy, gold, words):
    assert said(proxy=proxy, gold=gold).startswith(words)


def test_figures_stand_beside_the_words():
    assert "(over-optimisation; proxy +0.500 (+0.200 to +0.800), gold +0.100 (-0.200 to +0.400)" in said(gold=FLAT)
    assert "rank correlation of 0.25" in said(gold=FLAT)


def test_length_explains_a_gain_when_nothing_is_left_and_the_slope_is_there():
    gone = SLOPE | {"gain": 0.0, "interval": [-0.1, 0.1]}
    assert "Length explains the gain: responses became longer, and at equal length it is +0.000" in said(length=gone)
    assert "became shorter" in said(length=gone | {"mean_difference": -3.0})
    assert "Length alone does not explain" in said(length=gone | {"slope_interval": [-0.01, 0.08]})
    assert "Length alone does not explain" in said(length=SLOPE | {"gain": 0.3, "interval": [0.1, 0.5]})
    assert "Length explains" in said(length=gone | {"slope_interval": [-0.08, -0.02]})
    for flat in ([0.0, 0.08], [-0.08, 0.0]):
        assert "Length alone does not explain" in said(length=gone | {"slope_interval": flat})
    assert "Length explains" in said(length=gone | {"interval": [0.0, 0.2]})
    assert "Length" not in said(length=gone, proxy=FLAT)  # no gain, nothing to explain


def test_degenerate_responses_are_named():
    words = said(tuned={"repetition": 0.2, "distinct_2": 0.5}, empty=0.25, same_response=0.3)
    assert "repetition went from 0.020 to 0.200" in words
    assert "distinct-2 went from 0.900 to 0.500" in words
    assert "25% are empty, 30% are identical" in words
    # As against the base model's 0.02 and 0.9: 0.1 more would be 0.12, and 70% of it 0.63.
    assert "degenerate" not in said(tuned={"repetition": 0.12, "distinct_2": 0.63})
    assert said(tuned={"repetition": 0.121}).endswith("Responses are degenerate: repetition went from 0.020 to 0.121.")
    assert "are degenerate: distinct-2 went from 0.900 to 0.629." in said(tuned={"distinct_2": 0.629})
    assert said(same_response=0.2).endswith("Responses are degenerate: 20% are identical.")
    assert "degenerate" not in said(same_response=0.19, tuned={})
    assert "degenerate" not in said(tuned={"repetition": 0.11, "distinct_2": 0.64}, empty=0.19)
    assert "20% are empty" in said(empty=0.2)


def test_nothing_evaluated_nothing_said():
    assert gain_conclusions({}, "full") == []
    record = evaluation(gold=ROSE)
    del record["gains"]["full"]["interval"]
    assert gain_conclusions(record, "full") == []
    assert "70%" in GAIN_RULES


def judged(proxy=ROSE, gold=None, n=50, eos=0.9, ending=None, **more):
    """An evaluation of full alone."""
    record = evaluation(proxy=proxy, gold=gold, tuned=PLAIN | {"eos_rate": eos}) | {"n_prompts": n, "ending": ending}
    record["gains"]["full"] |= more
    return record


@pytest.mark.parametrize(
    ("proxy", "gold", "headline", "words", "sentence"),
    [
        (ROSE, ROSE, "a gain, confirmed by the", "gain, confirmed", "raised the mean reward by +0.500 (95% interval"),
        (ROSE, FLAT, "a gain that the second reward model does not confirm", "gain, not confirmed", "not confirm it"),
        (ROSE, FELL, "a gain that the second reward model sees as a loss", "gain, contradicted", "but the second"),
        (ROSE, None, "a gain, not checked", "gain, not checked", "; no second reward model scored the responses."),
        (FLAT, FLAT, "no gain shown", "no gain shown", "; nor does the second reward model: +0.100 (-0.200 to +0.400)"),
        (FLAT, ROSE, "no gain shown", "no gain shown", "though the second reward model sees one: +0.500"),
        (FLAT, FELL, "no gain shown", "no gain shown", "and the second reward model sees a loss"),
        (FELL, FELL, "a loss", "loss", "lowered the mean reward by -0.500"),
        (FELL, FLAT, "a loss", "loss", "but the second reward model does not"),
        ([0.0, 0.4], [0.0, 0.4], "no gain shown", "no gain shown", "; nor does the second reward model"),  # 0 is inside
        ([-0.4, 0.0], [-0.4, 0.0], "no gain shown", "no gain shown", "; nor does the second reward model"),
    ],
)
def test_the_verdict_names_the_gain_and_what_the_second_reward_model_says(proxy, gold, headline, words, sentence):
    found = verdict(judged(proxy, gold))
    assert found.headline.startswith(f"Full: {headline}")
    assert found.words == {"full": words}
    assert sentence in found.sentences[0]
    assert found.sentences[0].startswith("PPO on all weights (full) ")


def test_one_headline_for_policies_that_did_the_same():
    record = judged(ROSE, ROSE)
    for part in ("gains", "validity"):
        record[part]["lora"] = record[part]["full"]
    assert verdict(record).headline == "Full and LoRA: a gain, confirmed by the second reward model."
    record["gains"]["lora"] = {"gain": 0.0, "interval": FLAT}
    assert verdict(record).headline == "Full: a gain, confirmed by the second reward model. LoRA: no gain shown."
    assert len(verdict(record).sentences) == 2


def test_without_a_gain_the_verdict_says_what_the_prompts_can_show():
    power = {"detectable": 0.987, "prompts_needed": 4634}
    (line,) = verdict(judged(FLAT, **power)).advice
    assert line == "Full: 50 prompts can show a gain of 0.99 (80% power); +0.100 would need about 4,600."
    assert verdict(judged(ROSE, ROSE, **power)).advice == []
    assert verdict(judged(FELL, **power)).advice == []
    record = judged(ROSE, FLAT, **power)
    record["validity"]["full"]["gold"] |= {"detectable": 0.5, "prompts_needed": 96}
    assert verdict(record).advice == [
        "Full: 50 prompts can show a gain of 0.50 by the second reward model (80% power); +0.100 would need about 96."
    ]
    assert "a gain of less than 0.01 (80% power)" in verdict(judged(FLAT, detectable=0.004)).advice[0]
    same = judged([0.0, 0.0], detectable=0.0, prompts_needed=None)
    assert verdict(same).advice == ["Full: the responses to all 50 prompts score exactly as before."]
    assert "a gain of 0.01 (80% power)" in verdict(judged(FLAT, detectable=0.005)).advice[0]
    many = verdict(judged(FLAT, n=1234, detectable=1.0, prompts_needed=12345)).advice
    assert many == ["Full: 1,234 prompts can show a gain of 1.00 (80% power); +0.100 would need about 12,000."]
    assert verdict(judged(FLAT, detectable=None)).advice == []
    assert "would need" not in verdict(judged(FLAT, detectable=0.9, prompts_needed=None)).advice[0]


def test_truncation_is_named_where_the_numbers_show_it():
    effect = {"ended": 10, "truncated": 140, "difference": 4.59, "interval": [2.0, 7.0]}
    (line,) = verdict(judged(FLAT, eos=0.06, ending=effect)).advice
    assert line.startswith(
        "Responses that end score 4.6 higher than truncated ones of the same model (+2.000 to +7.000;"
    )
    assert "10 ended, 140 truncated), and 94% of full's are truncated: change the length limit before" in line
    assert "50% of full's are truncated" in verdict(judged(FLAT, eos=0.5, ending=effect)).advice[0]
    assert len(verdict(judged(FELL, eos=0.06, ending=effect)).advice) == 1
    both = judged(FLAT, eos=0.06, ending=effect)
    both["gains"]["lora"], both["models"]["lora"] = both["gains"]["full"], PLAIN | {"eos_rate": 0.3}
    assert "and 94% of full's and 70% of LoRA's are truncated" in verdict(both).advice[-1]
    for other in (
        judged(FLAT, eos=None, ending=effect),
        judged(FLAT, eos=0.06, ending=effect | {"interval": [0.0, 9.0]}),
        judged(FLAT, eos=0.51, ending=effect),  # most end
        judged(ROSE, ROSE, eos=0.06, ending=effect),  # a gain
        judged(FLAT, eos=0.06, ending=effect | {"interval": [-0.1, 9.0]}),  # noise
        judged(FLAT, eos=0.06),
    ):
        assert verdict(other).advice == []


def test_one_prompt_has_no_verdict():
    """Its interval has no width, so it excludes 0."""
    assert verdict(judged(ROSE, ROSE) | {"n_prompts": 2}) is not None
    assert verdict(judged(ROSE, ROSE) | {"n_prompts": 1}) is None
    assert gain_conclusions(evaluation(gold=ROSE) | {"n_prompts": 1}, "full") == []


def test_the_confidence_is_the_evaluations_and_a_judge_has_an_interval():
    record = judged(ROSE, ROSE) | {"confidence": 0.9}
    assert "(90% interval +0.200 to +0.800), and the second" in verdict(record).sentences[0]
    record["validity"]["full"]["gold"]["interval"] = None
    assert verdict(record).words == {"full": "gain, not checked"}
    record["validity"]["full"] = None
    assert verdict(record).words == {"full": "gain, not checked"}


@pytest.mark.parametrize(
    ("scores", "gain", "words"),
    [
        ([1.0, 1, 9, 9, 9, 9, 2, 2], -0.5, "rose during training (1.000 to 2.000) and fell in the evaluation (-0.500)"),
        ([2.0, 9, 9, 1.0], 0.5, "fell during training (2.000 to 1.000) and rose in the evaluation (+0.500)"),
        ([2.0, 1.0], 0.5, "fell during training (2.000 to 1.000)"),
        ([2.0, 1.0], -0.5, None),
        ([2.0, 2.0], 0.5, None),
        ([2.0, 1.0], 0.0, None),
        ([2.0, 1.0], None, None),
        ([2.0], 0.5, None),
    ],
)
def test_training_and_evaluation_may_say_the_opposite(scores, gain, words):
    found = score_conclusion([{"step": i, "objective/scores": score} for i, score in enumerate(scores)], gain)
    assert found is None if words is None else found.startswith(f"the score {words}")


def test_no_gain_no_verdict():
    assert verdict({}) is None
    assert verdict({"gains": {"full": None, "lora": {"gain": 0.5}}}) is None
