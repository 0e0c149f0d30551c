"""The plots hold the numbers they were given."""

import pytest
from test_plots import lines, texts

from rlhf.reporting.plots.evaluation import gains, score_against_length


def test_gains_draws_the_ends_of_each_interval_under_both_judges():
    records = {"full": {"gain": 0.4, "interval": [0.1, 0.9]}, "lora": {"gain": -0.1}, "other": {}}
    figure = gains(records, {"full": {"gain": 0.2, "interval": [-0.3, 0.5]}})
    shown = lines(figure)
    assert shown["_full interval"] == ([0.1, 0.9], [0, 0])
    assert shown["full"] == ([0.4], [0])
    assert shown["_full gold interval"] == ([-0.3, 0.5], [1, 1])
    assert shown["full gold"] == ([0.2], [1])
    assert shown["_lora interval"] == ([-0.1, -0.1], [2, 2])
    assert not any("other" in name for name in shown)
    assert texts(figure)[2:] == [
        "full, PPO's reward model: +0.400",
        "full, second reward model: +0.200",
        "LoRA, PPO's reward model: -0.100",
    ]
    assert "99%" in texts(gains(records, confidence=0.99))[1]


def test_a_line_a_model_through_many_responses_and_none_through_few():
    rows = [{"model": "base", "response_length": n, "score": 1 + 0.5 * n} for n in range(2, 22)]
    rows += [
        {"model": "full", "response_length": 3, "score": None},
        *({"model": "full", "response_length": n, "score": 2 * n} for n in range(19)),
    ]
    figure = score_against_length(rows)
    assert [len(dots.get_offsets()) for dots in figure.axes[0].collections] == [20, 19]
    shown = lines(figure)
    assert shown["_base line"][0] == [2, 21]
    assert shown["_base line"][1] == pytest.approx([2, 11.5])
    assert "_full line" not in shown
    assert {"base", "full"} <= set(shown)


@pytest.mark.parametrize(("kinds", "drawn"), [(1, False), (2, False), (3, True)])
def test_no_line_through_responses_of_one_or_two_lengths(kinds, drawn):
    rows = [{"model": "full", "response_length": 5 + i % kinds, "score": float(i)} for i in range(20)]
    assert ("_full line" in lines(score_against_length(rows))) is drawn


def test_the_second_reward_model_s_gains_are_hollow_and_thinner():
    figure = gains({"lora": {"gain": 0.4, "interval": [0.1, 0.9]}}, {"lora": {"gain": 0.2, "interval": [0.0, 0.5]}})
    shown = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert (shown["lora"].get_markerfacecolor(), shown["lora gold"].get_markerfacecolor()) == ("#d55e00", "#ffffff")
    assert (shown["_lora interval"].get_linewidth(), shown["_lora gold interval"].get_linewidth()) == (3, 1.8)
    places = [list(line.get_xdata()) for line in figure.axes[0].get_lines() if line.get_label() == "_place"]
    assert places == [[0, 0]] * 2
    assert figure.get_size_inches()[1] == pytest.approx(3.2)
    many = gains({f"m{i}": {"gain": 0.1} for i in range(6)})
    assert many.get_size_inches()[1] == pytest.approx(1.15 + 0.5 * 6)


@pytest.mark.parametrize(("count", "image"), [(1000, False), (1001, True)])
def test_thousands_of_dots_are_an_image(count, image):
    figure = score_against_length([{"model": "base", "response_length": 1, "score": 1.0}] * count)
    assert bool(figure.axes[0].collections[0].get_rasterized()) is image


def test_models_have_their_own_marks_and_one_without_scores_has_none():
    rows = [{"model": name, "response_length": 1, "score": 1.0} for name in ("base", "full", "lora")]
    figure = score_against_length([rows[0], {"model": "none", "response_length": 2}, *rows[1:]])
    found = [(line.get_label(), line.get_marker()) for line in figure.axes[0].get_lines()]
    assert found == [("base", "o"), ("full", "D"), ("LoRA", "^")]
