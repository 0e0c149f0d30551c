import re
from xml.etree import ElementTree

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from rlhf.reporting.plots import training as plots
from rlhf.reporting.plots.style import add_legend, label_rows, line_of, panel, to_png, to_svg

KL = [0.01, 0.02, 0.05, 0.1, 0.11]


def ppo_rows(kl: list[float]) -> list[dict[str, float]]:
    return [
        {
            "step": i + 1,
            "objective/kl_per_token": value,
            "objective/kl": 40 * value,
            "objective/kl_coef": 0.05,
            "objective/scores": float(i),
            "objective/response_length": 40.0 + i,
            "objective/eos_rate": 0.1 * i,
        }
        for i, value in enumerate(kl)
    ]


def lines(figure: Figure, panel: int = 0) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in figure.axes[panel].get_lines()
    }


def texts(figure: Figure) -> list[str]:
    """Title and unit, then the texts inside the panel."""
    return [text.get_text() for text in (*figure.texts, *figure.axes[0].texts)]


def test_kl_shows_both_runs_and_the_band() -> None:
    figure = plots.kl({"full": ppo_rows(KL), "lora": ppo_rows(KL[:2])})
    assert lines(figure) == {"full": ([1, 2, 3, 4, 5], KL), "LoRA": ([1, 2], [0.01, 0.02])}
    (band,) = figure.axes[0].patches
    assert band.get_extents().transformed(figure.axes[0].transData.inverted()).intervaly == pytest.approx([0.02, 0.1])
    assert "0.02–0.1" in str(band.get_label())
    assert texts(figure) == ["KL to the reference", "nats per response token"]


def test_further_curves_show_what_changes() -> None:
    rows = {"full": ppo_rows(KL), "lora": ppo_rows(KL[:3])}
    figure = plots.curve(rows, "ppo_length")
    assert figure is not None
    assert lines(figure)["LoRA"][1] == [40, 41, 42]
    assert texts(figure) == ["Response length", "mean tokens"]
    figure = plots.curve(rows, "ppo_eos")
    assert figure is not None
    assert lines(figure)["LoRA"][1] == [0, 0.1, 0.2]
    assert plots.curve(rows, "ppo_kl_coef") is None  # it never changes
    assert plots.curve({}, "ppo_eos") is None


def test_colours_and_styles_tell_the_runs_apart() -> None:
    full, lora = plots.kl({"full": ppo_rows(KL), "lora": ppo_rows(KL)}).axes[0].get_lines()
    assert (to_hex(full.get_color()), full.get_linestyle()) == ("#0072b2", "-")
    assert (to_hex(lora.get_color()), lora.get_linestyle()) == ("#d55e00", "--")


def test_scores_against_the_root_of_kl() -> None:
    kl = [0.0, 1.0, 4.0, 9.0, -0.5]  # roots 0 1 2 3; an estimate below 0 has none
    rows = [{"step": i, "objective/kl": value, "objective/scores": 1 + 2 * i} for i, value in enumerate(kl)]
    figure = plots.scores_against_kl({"full": rows})
    (dots,) = figure.axes[0].collections
    assert dots.get_offsets().tolist() == [[0, 1], [1, 3], [2, 5], [3, 7]]
    assert lines(figure) == {"full": ([], [])}  # the legend's; no line through the dots


def test_many_scores_are_smoothed_and_few_are_not() -> None:
    shown = lines(plots.scores({"full": ppo_rows([0.05] * 24)}))
    assert shown["_measured"][1] == list(range(24))
    assert shown["full"][1][9:12] == [4.5, 5.5, 6.5]  # means of 0..9, 1..10, 2..11
    assert lines(plots.scores({"full": ppo_rows(KL)})) == {"full": ([1, 2, 3, 4, 5], [0, 1, 2, 3, 4])}


def test_scores_stand_within_their_standard_error() -> None:
    # 16 responses a step, standard deviation 2: error 0.5
    rows = [row | {"objective/scores_std": 2.0, "episode": 16 * row["step"]} for row in ppo_rows(KL)]
    (band,) = plots.scores({"full": rows}).axes[0].collections
    assert band.get_paths()[0].get_extents().intervaly.tolist() == [-0.5, 4.5]
    assert not plots.scores({"full": ppo_rows(KL)}).axes[0].collections


def test_learning_curves_tell_training_from_validation() -> None:
    rows = [
        {"step": 10, "loss": 0.9, "accuracy": 0.5},
        {"step": 20, "loss": 0.7, "accuracy": 0.6},
        {"step": 20, "eval_loss": 0.8, "eval_accuracy": 0.55},
        {"step": 20, "train_runtime": 3.0},
    ]
    loss, accuracy = plots.reward_loss(rows, best_step=20), plots.reward_accuracy(rows, best_step=20)
    assert lines(loss)["training"] == ([10, 20], [0.9, 0.7])
    assert lines(loss)["validation"] == ([20], [0.8])
    assert lines(loss)["best step (20)"][0] == [20, 20]
    assert lines(accuracy)["training"][1] == [0.5, 0.6]
    assert lines(accuracy)["validation"][1] == [0.55]
    assert "best step (20)" not in lines(plots.reward_loss(rows))


def test_accuracies_are_named_and_have_their_intervals() -> None:
    rows = [
        ("all pairs", {"accuracy": 0.75, "interval": [0.6, 0.85]}),
        ("rule: longer $x$", {"accuracy": 0.5}),
        ("odd", {"accuracy": None}),
    ]
    figure = plots.accuracies(rows)
    shown = lines(figure)
    assert shown["_all pairs interval"] == ([0.6, 0.85], [0, 0])
    assert shown["_rule: longer $x$ interval"] == ([0.5, 0.5], [1, 1])
    assert texts(figure)[2:] == ["all pairs: 75.0%", "rule: longer $x$: 50.0%"]


def test_calibration_leaves_out_empty_bins() -> None:
    bins = [{"confidence": 0.55, "accuracy": 0.5, "n": 40}, {"confidence": 0.65, "accuracy": 0.0, "n": 0}]
    figure = plots.calibration([*bins, {"confidence": 0.9, "accuracy": 0.8, "n": 10}], ece=0.08)
    assert texts(figure)[1] == "accuracy (share of pairs), ECE 0.080"
    assert lines(figure)["reward model"] == ([0.55, 0.9], [0.5, 0.8])


def test_png_is_a_png_and_repeatable() -> None:
    first, second = (to_png(plots.kl({"full": ppo_rows(KL)})) for _ in range(2))
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    assert first == second


@pytest.mark.parametrize("draw", [plots.kl, plots.scores, plots.scores_against_kl])
def test_rows_without_the_metric_still_make_a_plot(draw) -> None:  # type: ignore[no-untyped-def]
    assert to_png(draw({"full": [{"step": 1}]}))


def test_svg_is_of_the_page() -> None:
    """Its colours are the page's, its text is text in the page's font, its ids are its own, and it fetches nothing."""
    rows = {"full": ppo_rows([-0.1, 0.2])}
    first, second = to_svg(plots.kl(rows), "a"), to_svg(plots.kl(rows), "b")
    assert first == to_svg(plots.kl(rows), "a")
    assert ElementTree.fromstring(first.replace("xlink:href", "href")).tag == "svg"
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", first)) == set()
    assert {"var(--full)", "var(--ink)", "var(--page)", "var(--green)"} <= set(re.findall(r"var\([^)]+\)", first))
    assert ">KL to the reference</text>" in first
    assert re.search(r">-0\.\d+</text>", first)  # a minus as in the tables
    assert "font-family" not in first
    assert "<style" not in first
    assert "http" not in first
    ids = [re.findall(r' id="([^"]+)"', text) for text in (first, second)]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    assert set(re.findall(r"#(\w+)", first)) <= set(ids[0])


def test_a_bins_dot_grows_with_its_pairs_and_all_dots_are_in_sight() -> None:
    bins = [{"confidence": 0.4, "accuracy": 0.25, "n": 40}, {"confidence": 0.9, "accuracy": 0.8, "n": 10}]
    figure = plots.calibration(bins)
    (dots,) = figure.axes[0].collections
    assert dots.get_sizes().tolist() == [15 + 110, 15 + 27.5]  # in points², of 40 and 10 pairs
    assert lines(figure)["perfectly calibrated"] == ([0, 1], [0, 1])
    assert figure.axes[0].get_xlim() == pytest.approx((0.38, 1.02))
    assert figure.axes[0].get_ylim() == pytest.approx((0.2, 1.05))
    assert texts(figure)[1] == "accuracy (share of pairs)"
    uncounted = plots.calibration([{"confidence": 0.9, "accuracy": 0.8}])
    assert lines(uncounted)["reward model"] == ([0.9], [0.8])
    assert not uncounted.axes[0].collections
    assert uncounted.axes[0].get_xlim() == pytest.approx((0.48, 1.02))
    assert uncounted.axes[0].get_ylim() == pytest.approx((0.48, 1.05))


def test_rules_are_grey_and_the_plot_grows_with_its_rows() -> None:
    rows = [("all pairs", {"accuracy": 0.75}), *((f"rule: {i}", {"accuracy": 0.5}) for i in range(7))]
    figure = plots.accuracies(rows)
    colours = {str(line.get_label()): to_hex(line.get_color()) for line in figure.axes[0].get_lines()}
    assert (colours["_all pairs"], colours["_rule: 0"], colours["_rule: 0 interval"]) == ("#b8588f", *["#5a616d"] * 2)
    places = [line for line in figure.axes[0].get_lines() if line.get_label() == "_place"]
    assert [list(line.get_xdata()) for line in places] == [[0.5, 0.5]] * 8
    assert figure.get_size_inches()[1] == pytest.approx(1.15 + 0.4 * 8)
    assert plots.accuracies(rows[:2]).get_size_inches()[1] == pytest.approx(3.2)
    bottom, top = figure.axes[0].get_ylim()
    assert bottom > top  # the first row on top


def test_axes_begin_and_end_where_the_numbers_can() -> None:
    def limits(figure: Figure | None) -> tuple[float, float]:
        assert figure is not None
        return figure.axes[0].get_ylim()

    rows = {"full": ppo_rows(KL)}
    assert limits(plots.kl(rows))[0] == 0
    assert limits(plots.kl({"full": ppo_rows([-0.5, 0.1])}))[0] < -0.5
    assert limits(plots.curve(rows, "ppo_eos")) == (-0.03, 1.03)
    assert limits(plots.curve(rows, "ppo_length"))[0] == 0


@pytest.mark.parametrize(("steps", "dotted"), [(19, True), (20, False)])
def test_curves_of_few_steps_have_dots(steps: int, dotted: bool) -> None:
    rows = {"full": ppo_rows([0.01 * i for i in range(steps)])}
    for draw in (plots.kl, plots.scores, lambda rows: plots.curve(rows, "ppo_length")):
        figure = draw(rows)
        assert figure is not None
        (line,) = (line for line in figure.axes[0].get_lines() if line.get_label() == "full")
        assert (line.get_marker() == "o") is dotted


def test_an_error_band_needs_the_spread_and_the_episodes_of_each_step() -> None:
    rows = [row | {"objective/scores_std": 2.0, "episode": 16 * row["step"]} for row in ppo_rows(KL)]
    for left_out in ("objective/scores_std", "episode"):
        few = [row if row["step"] < 5 else {k: v for k, v in row.items() if k != left_out} for row in rows]
        assert not plots.scores({"full": few}).axes[0].collections
    assert not plots.scores({"full": [row | {"step": row["step"] - 1} for row in rows]}).axes[0].collections
    # a fourth of an episode a step counts as one response: error 2
    (band,) = plots.scores({"full": [row | {"episode": row["step"] / 4} for row in rows]}).axes[0].collections
    assert band.get_paths()[0].get_extents().intervaly.tolist() == [-2, 6]


def test_later_steps_are_darker_and_the_runs_have_their_own_marks() -> None:
    rows = [{"step": i, "objective/kl": 1.0, "objective/scores": 1.0} for i in range(4)]
    figure = plots.scores_against_kl({"full": rows, "lora": rows[:1], "other": [{"step": 1}]})
    first, second = figure.axes[0].collections
    assert first.get_alpha() == pytest.approx([0.4125, 0.575, 0.7375, 0.9])
    assert to_hex(second.get_facecolor()[0]) == "#d55e00"
    assert [(line.get_label(), line.get_marker()) for line in figure.axes[0].get_lines()] == [
        ("full", "o"),
        ("LoRA", "D"),
    ]


def test_a_legend_names_what_has_a_name_and_needs_one() -> None:
    figure, axis = panel("Title", "unit", "step")
    axis.plot([0, 1], [0, 1], label="_hidden")
    add_legend(axis)
    assert not figure.legends
    axis.plot([0, 1], [0, 1], label="shown")
    add_legend(axis)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["shown"]
    assert axis.get_xlabel() == "step"
    bottom = axis.get_position().y0
    assert panel("Title", "unit", "step", legend=False)[1].get_position().y0 == pytest.approx(bottom - 0.28 / 3.2)
    assert [side for side, spine in axis.spines.items() if spine.get_visible()] == ["left", "bottom"]


def test_a_model_of_another_name_has_a_look_of_its_own() -> None:
    assert line_of("mine") == {"color": "#009e73", "linestyle": "-.", "linewidth": 1.8, "label": "mine"}


def test_steps_are_whole_numbers_and_names_are_no_formulas() -> None:
    for x, whole in (("PPO step", True), ("tokens", False)):
        axis = panel("t", "u", x)[1]
        axis.set_xlim(0, 1)
        assert all(float(tick).is_integer() for tick in axis.get_xticks()) is whole
    axis = panel("t", "u", "x")[1]
    label_rows(axis, ["a $x$", "b"])
    assert [text.get_parse_math() for text in axis.texts] == [False, False]
    assert [text.get_position()[1] for text in axis.texts] == [-0.2, 0.8]
