"""The plots hold the numbers they were given."""

import pytest

from rlhf.reporting.plots.evaluation import proxy_and_gold, score_against_length


def test_a_bar_for_each_judge_and_none_for_a_model_without_gold():
    records = {
        "full": {"proxy_in_sd": 0.8, "gold": {"in_sd": -0.2}},
        "lora": {"proxy_in_sd": 0.5, "gold": {"in_sd": 0.4}},
        "other": {"proxy_in_sd": 0.5},
    }
    axis = proxy_and_gold(records).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [0.8, -0.2, 0.5, 0.4]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["full", "LoRA"]
    assert [text.get_text() for text in axis.texts] == ["proxy +0.80", "gold -0.20", "proxy +0.50", "gold +0.40"]


def test_a_line_a_model_through_its_responses():
    rows = [{"model": "base", "response_length": n, "score": 1 + 0.5 * n} for n in (2, 4, 6)]
    rows += [
        {"model": "full", "response_length": 3, "score": None},
        {"model": "full", "response_length": 5, "score": 2},
    ]
    axis = score_against_length(rows).axes[0]
    assert [len(dots.get_offsets()) for dots in axis.collections] == [3, 1]
    assert list(axis.lines[0].get_xdata()) == [2, 6]
    assert list(axis.lines[0].get_ydata()) == pytest.approx([2, 4])
    assert len(axis.lines[1].get_xdata()) == 0  # one response has no slope
