"""The audit of a reward model, by hand and on planted faults."""

import numpy as np
import pytest

from rlhf.data.hh_rlhf import Pair
from rlhf.reward.audit import audit, bag_of_words, leaked


def pair(chosen, rejected, opening="hello", source="helpful/a.jsonl:1"):
    return Pair([{"role": "user", "content": opening}], chosen, rejected, source)


TRAIN = [pair(f"kind reply {i}", f"rude reply {i}", opening=f"train {i}") for i in range(20)]
TEST = [
    pair("kind one two", "rude", source="helpful/a.jsonl:1"),
    pair("kind", "rude one two", source="helpful/a.jsonl:2"),
    pair("kind one", "rude two", source="harmless/a.jsonl:1"),
    pair("rude", "kind one", source="harmless/a.jsonl:2"),
]


def test_groups_by_hand():
    # Right, right, a tie, wrong.
    found = audit(TRAIN, TEST, np.array([1.0, -4.0, 5.0, -3.0]), np.array([-1.0, -5.0, 5.0, -2.0]))
    groups = found["groups"]
    assert {name: (g["n"], g["accuracy"]) for name, g in groups["subset"].items()} == {
        "helpful": (2, 1.0),
        "harmless": (2, 0.25),
    }
    assert {name: (g["n"], g["accuracy"]) for name, g in groups["length"].items()} == {
        "chosen is longer": (1, 1.0),
        "rejected is longer": (2, 0.5),
        "equally long": (1, 0.5),
    }
    # Of either sign: 2 is large, the second 1 is middle, 0 and the first 1 are small.
    assert {name: (g["n"], g["accuracy"]) for name, g in groups["size of margin"].items()} == {
        "large": (1, 1.0),
        "small": (2, 0.75),
        "middle": (1, 0.0),
    }
    low, high = groups["subset"]["helpful"]["interval"]
    assert (low, high) == pytest.approx((2 / (2 + 1.959964**2), 1))  # Wilson's, 2 of 2


def test_baselines_by_hand():
    found = audit(TRAIN, TEST, np.array([1.0, -4.0, 5.0, -3.0]), np.array([-1.0, -5.0, 5.0, -2.0]))["baselines"]
    assert found["longer response"]["accuracy"] == 1.5 / 4
    assert found["shorter response"]["accuracy"] == 2.5 / 4
    assert found["bag of words"]["accuracy"] == 3 / 4  # it learned that kind beats rude
    # Against "longer": better on the second pair only.
    assert (found["longer response"]["better"], found["longer response"]["worse"]) == (1, 0)
    assert found["longer response"]["p_value"] == 1
    assert (found["bag of words"]["better"], found["bag of words"]["worse"]) == (0, 1)


def test_a_model_that_scores_length_is_found_out():
    texts = [("word " * (3 + i), "word " * 2) for i in range(8)]
    test = [pair(a.strip(), b.strip()) for a, b in texts]
    scores = [np.array([len(t[side].split()) for t in texts], float) for side in (0, 1)]
    found = audit(TRAIN, test, *scores)
    assert found["length_correlation"] == pytest.approx(1)
    assert found["baselines"]["longer response"]["better"] == 0


def test_bag_of_words_takes_no_side():
    swapped = [pair(p.rejected, p.chosen) for p in TEST]
    assert bag_of_words(TRAIN, TEST) == pytest.approx(-bag_of_words(TRAIN, swapped))


def test_leaks_are_counted():
    assert leaked(TRAIN, TEST) == {"opening": 0, "chosen_response": 0}
    assert leaked(TRAIN, [pair(" Kind  reply 3", "x", opening="TRAIN 4")]) == {"opening": 1, "chosen_response": 1}
    assert leaked(TRAIN, [pair("rude reply 3", "x")]) == {"opening": 0, "chosen_response": 1}  # it was rejected there
    assert leaked(TRAIN, [pair("x", "kind reply 3")]) == {"opening": 0, "chosen_response": 0}


def test_scores_without_variation_have_no_correlation():
    assert audit(TRAIN, TEST, np.zeros(4), np.zeros(4))["length_correlation"] is None


def test_chinese_texts_have_lengths_and_words():
    def answers(n, chosen, rejected):
        return Pair([{"role": "user", "content": f"q{n}"}], chosen, rejected, f"f/f:{n}")

    train = [answers(n, "好的谢谢你", "不知道") for n in range(4)]
    test = [answers(9, "谢谢", "我不知道啊"), answers(10, "好的", "不")]
    found = audit(train, test, [1.0, 1.0], [0.0, 0.0])
    assert {name: g["n"] for name, g in found["groups"]["length"].items()} == {
        "rejected is longer": 1,
        "chosen is longer": 1,
    }
    assert found["baselines"]["longer response"]["accuracy"] == 1 / 2
    assert found["baselines"]["bag of words"]["accuracy"] == 1
