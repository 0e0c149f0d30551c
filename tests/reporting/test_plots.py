import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from rlhf.reporting.plots import training as plots

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


def test_kl_shows_both_runs_and_the_band() -> None:
    figure = plots.kl({"full": ppo_rows(KL), "lora": ppo_rows(KL[:2])})
    assert lines(figure) == {"full": ([1, 2, 3, 4, 5], KL), "LoRA": ([1, 2], [0.01, 0.02])}
    (band,) = figure.axes[0].patches
    assert band.get_extents().transformed(figure.axes[0].transData.inverted()).intervaly == pytest.approx([0.02, 0.1])
    assert "0.02–0.1" in str(band.get_label())
    assert "nats" in figure.axes[0].get_ylabel()
    assert lines(figure, 1)["full"][1] == [40 * value for value in KL]
    assert lines(figure, 2)["LoRA"][1] == [0.05, 0.05]


def test_colours_and_styles_tell_the_runs_apart() -> None:
    full, lora = plots.kl({"full": ppo_rows(KL), "lora": ppo_rows(KL)}).axes[0].get_lines()
    assert (to_hex(full.get_color()), full.get_linestyle()) == ("#0072b2", "-")
    assert (to_hex(lora.get_color()), lora.get_linestyle()) == ("#d55e00", "--")


def test_scores_against_the_root_of_kl_with_their_line() -> None:
    kl = [0.0, 1.0, 4.0, 9.0, -0.5]  # roots 0 1 2 3; an estimate below 0 has none
    rows = [{"step": i, "objective/kl": value, "objective/scores": 1 + 2 * i} for i, value in enumerate(kl)]
    figure = plots.scores_against_kl({"full": rows})
    (dots,) = figure.axes[0].collections
    assert dots.get_offsets().tolist() == [[0, 1], [1, 3], [2, 5], [3, 7]]
    assert lines(figure)["full: slope 2.00, r 1.00"] == ([0, 3], [1, 7])


def test_scores_are_shown_as_measured_and_smoothed() -> None:
    shown = lines(plots.scores({"full": ppo_rows([0.05] * 12)}))
    assert shown["_measured"][1] == list(range(12))
    assert shown["full"][1][9:] == [4.5, 5.5, 6.5]  # means of 0..9, 1..10, 2..11


def test_response_shape() -> None:
    figure = plots.response_shape({"lora": ppo_rows(KL[:3])})
    assert lines(figure, 0)["LoRA"][1] == [40, 41, 42]
    assert lines(figure, 1)["LoRA"][1] == [0, 0.1, 0.2]


def test_learning_curves_tell_training_from_validation() -> None:
    rows = [
        {"step": 10, "loss": 0.9, "accuracy": 0.5},
        {"step": 20, "loss": 0.7, "accuracy": 0.6},
        {"step": 20, "eval_loss": 0.8, "eval_accuracy": 0.55},
        {"step": 20, "train_runtime": 3.0},
    ]
    figure = plots.learning_curves(rows, best_step=20)
    assert lines(figure, 0)["training"] == ([10, 20], [0.9, 0.7])
    assert lines(figure, 0)["validation"] == ([20], [0.8])
    assert lines(figure, 0)["best step (20)"][0] == [20, 20]
    assert lines(figure, 1)["training"][1] == [0.5, 0.6]
    assert lines(figure, 1)["validation"][1] == [0.55]
    assert "best step (20)" not in lines(plots.learning_curves(rows))


def test_confusion_matrix_cells_are_counts_and_row_shares() -> None:
    axis = plots.confusion_matrix([[60, 40], [0, 0]], ["a$x$", "b"]).axes[0]
    assert [text.get_text() for text in axis.texts] == ["60\n60%", "40\n40%", "0\n0%", "0\n0%"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a$x$", "b"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted", "true")


def test_calibration_leaves_out_empty_bins() -> None:
    bins = [{"confidence": 0.55, "accuracy": 0.5, "n": 40}, {"confidence": 0.65, "accuracy": 0.0, "n": 0}]
    figure = plots.calibration([*bins, {"confidence": 0.9, "accuracy": 0.8, "n": 10}], ece=0.08)
    assert lines(figure)["reward model (ECE 0.080)"] == ([0.55, 0.9], [0.5, 0.8])


def test_gains_draws_the_ends_of_each_interval() -> None:
    records = {"full": {"gain": 0.4, "interval": [0.1, 0.9]}, "lora": {"gain": -0.1}, "other": {}}
    shown = lines(plots.gains(records))
    assert shown["_full interval"] == ([0.1, 0.9], [0, 0])
    assert shown["full"] == ([0.4], [0])
    assert shown["_lora interval"] == ([-0.1, -0.1], [1, 1])
    assert "other" not in shown


def test_png_is_a_png_and_repeatable() -> None:
    first, second = (plots.to_png(plots.gains({"full": {"gain": 0.4}})) for _ in range(2))
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    assert first == second


@pytest.mark.parametrize("draw", [plots.kl, plots.scores, plots.scores_against_kl, plots.response_shape])
def test_rows_without_the_metric_still_make_a_plot(draw) -> None:  # type: ignore[no-untyped-def]
    assert plots.to_png(draw({"full": [{"step": 1}]}))
