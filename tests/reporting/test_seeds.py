"""Several runs: means and intervals worked by hand, the page's words, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pypdf import PdfReader
from scipy.stats import ttest_rel
from test_plots import lines
from test_report import ATTACK, Page, evaluation_result, ppo_row, reward_result, run_json, write

from rlhf.cli import report
from rlhf.cli.script import run_script
from rlhf.errors import UserError
from rlhf.reporting import seed_report, seeds
from rlhf.reporting.plots import seeds as seed_plots
from rlhf.reporting.run import read_run
from rlhf.reporting.seed_report import build_seed_report, read_runs

FULL, LORA = [1.0, 2.0, 3.0], [1.5, 2.0, 2.5]
PLOTS = {f"seeds_{name}" for name in ("loss", "accuracy", "scores", "kl", "gains")}
STAGES = ("reward", "ppo_full", "ppo_lora", "evaluation")


def make_run(run: Path, seed: int, full: float, lora: float) -> Path:
    for stage in STAGES:
        facts = run_json(stage) | {"seed": seed}
        facts["config"] |= {"seed": seed, "output_dir": f"runs/{run.name}/{stage}"}
        facts["config"] |= {"reward_model_path": f"/data/runs/{run.name}/reward"}
        write(run / stage / "run.json", facts)
    write(run / "reward/metrics.jsonl", [{"step": i, "eval_loss": 1 / i, "eval_accuracy": 0.6} for i in (1, 2)])
    write(run / "reward/evaluation.json", reward_result())
    for method, kl in (("full", 0.05), ("lora", 0.03)):
        write(run / f"ppo_{method}/metrics.jsonl", [ppo_row(i, kl * seed) for i in range(1, 9)])
    evaluation = evaluation_result() | {"validity": {}}
    evaluation["gains"]["full"]["gain"], evaluation["gains"]["lora"]["gain"] = full, lora
    write(run / "evaluation/evaluation.json", evaluation)
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path / f"study-{seed}", seed, full, lora)
        for seed, full, lora in zip((1, 2, 3), FULL, LORA, strict=True)
    ]


def page_of(runs: list[Path]) -> str:
    page = Page(build_seed_report(runs[0].parent / "study", runs).read_text(encoding="utf-8"))
    return re.sub(r" (?=[,;:).])", "", page.text)


def change(path: Path, edit: Callable[[Any], None]) -> None:
    record = json.loads(path.read_text())
    edit(record)
    write(path, record)


def test_interval_and_p_value_by_hand() -> None:
    # 1 2 3: sd 1, standard error 1/sqrt(3) = 0.57735, t(0.975, 2) = 4.30265: 2 +- 2.4841
    summary = seeds.summary_of("x", "num", [1.0, None, 2.0, 3.0])
    assert summary is not None
    assert (summary.mean, summary.n) == (2.0, 3)
    assert summary.interval == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)
    # t of 2 / 0.57735 = 3.4641 with 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2) = 1 - 3.4641 / sqrt(14)
    assert summary.p_value == pytest.approx(0.074180, abs=1e-6)


def test_one_value_has_no_interval_and_none_no_summary() -> None:
    one = seeds.summary_of("x", "num", [None, 0.5])
    assert one is not None
    assert (one.mean, one.interval, one.p_value) == (0.5, None, None)
    assert seeds.summary_of("x", "num", [None, None]) is None
    equal = seeds.summary_of("x", "num", [0.5, 0.5])
    assert equal is not None
    assert (equal.interval, equal.p_value) == (None, None)  # no spread to judge by
    almost = seeds.summary_of("x", "num", [0.3, 0.1 + 0.2, 0.3])
    assert almost is not None
    assert almost.interval is None


def test_lora_minus_full_is_paired_by_run(runs: list[Path]) -> None:
    gain, kl, length, eos = seeds.differences([read_run(path) for path in runs])
    # 0.5 0 -0.5: mean 0, sd 0.5, half 4.30265 * 0.5 / sqrt(3) = 1.24207
    assert gain.values == [0.5, 0.0, -0.5]
    assert gain.interval == pytest.approx((-1.24207, 1.24207), abs=1e-5)
    assert gain.p_value == pytest.approx(ttest_rel(LORA, FULL).pvalue)
    # KL: -0.02 times the seed: mean -0.04, sd 0.02
    assert kl.values == pytest.approx([-0.02, -0.04, -0.06])
    assert kl.p_value == pytest.approx(ttest_rel([0.03, 0.06, 0.09], [0.05, 0.1, 0.15]).pvalue)
    assert (length.mean, eos.mean) == (0, 0)


def test_kl_at_the_end_is_of_the_last_quarter(runs: list[Path]) -> None:
    write(runs[0] / "ppo_full/metrics.jsonl", [ppo_row(i, float(i)) for i in range(1, 21)])
    assert seeds.measure(read_run(runs[0]), "kl_per_token", "full") == 18  # 16 to 20 of 20
    assert seeds.measure(read_run(runs[0]), "kl_per_token", "base") is None


def test_gain_by_a_second_reward_model_is_taken_where_it_is(runs: list[Path]) -> None:
    for path in runs[:2]:
        change(path / "evaluation/evaluation.json", lambda e: e.update(validity={"full": {"gold": {"gain": 0.25}}}))
    found = {row.name: row.values for row in seeds.summaries([read_run(path) for path in runs])}
    assert found["Gain by the second reward model, full"] == [0.25, 0.25, None]
    assert "Gain by the second reward model, LoRA" not in found


def test_page_says_what_the_numbers_carry(runs: list[Path]) -> None:
    text = page_of(runs)
    for words in [
        "study: 3 runs",
        "Gain in mean reward, full: over 3 seeds +2.000 on average (95% interval -0.484 to +4.484): the interval "
        "includes 0: no gain beyond the spread of the seeds.",
        "Gain in mean reward, LoRA: over 3 seeds +2.000 on average (95% interval +0.758 to +3.242): the interval "
        "excludes 0: a gain beyond",
        "over 3 seeds LoRA minus full is 0.000 on average (95% interval -1.242 to +1.242, p = 1.000): the interval "
        "includes 0: no difference beyond the spread of the seeds.",
        "study-2 done, seed 2",
        "Gain in mean reward, full 3 +2.000 [-0.484, +4.484] +1.000 +2.000 +3.000",
        "Reward model, accuracy 3 65.5% 65.5% 65.5% 65.5%",
        "EOS rate, base 3 90.0%",
        "The same in all runs, except for seeds and the run's own folder.",
    ]:
        assert words in text, words


def test_equal_values_of_several_runs_give_no_conclusion(runs: list[Path]) -> None:
    for path in runs:
        change(path / "evaluation/evaluation.json", lambda e: e["gains"]["full"].update(gain=0.378))
    text = page_of(runs)
    assert (
        "Gain in mean reward, full: all 3 runs have +0.378: without a spread there is no interval to judge by." in text
    )
    assert "Gain in mean reward, full: over" not in text
    assert "Response length (tokens): LoRA minus full is 0.000 in all 3 runs: without a spread there is no" in text


def test_an_interval_beyond_0_is_said_with_its_direction(runs: list[Path]) -> None:
    for path, lora in zip(runs, (2.0, 3.1, 4.0), strict=True):
        change(path / "evaluation/evaluation.json", lambda e, gain=lora: e["gains"]["lora"].update(gain=gain))
    text = page_of(runs)
    assert "p = 0.00" in text
    assert "the interval excludes 0: higher with LoRA, beyond the spread of the seeds" in text


def test_files_of_the_page_and_the_same_page_again(runs: list[Path]) -> None:
    page = build_seed_report(runs[0].parent / "new/study", runs, "A <title>", "A. Student")
    assert {path.name for path in page.parent.iterdir()} == {"seeds.html", *(f"{name}.png" for name in PLOTS)}
    html = page.read_bytes()
    assert b"<h1>A &lt;title&gt;</h1>" in html
    assert build_seed_report(runs[0].parent / "new/study", runs, "A <title>", "A. Student").read_bytes() == html
    found = Page(html.decode())
    pictures = [attributes for attributes in found.all("div") if attributes.get("role") == "img"]
    assert len(pictures) == len(found.all("svg")) == len(PLOTS)
    assert all(picture.get("aria-label") for picture in pictures)
    assert {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "img", "image"} == set()
    assert all(str(link["href"]).startswith("#") for link in found.all("a"))
    assert len(found.all("caption")) == len(found.all("table"))


def test_text_of_a_run_is_escaped(runs: list[Path]) -> None:
    change(runs[0] / "ppo_full/run.json", lambda r: r["config"].update(note=ATTACK))
    change(runs[1] / "evaluation/run.json", lambda r: r.update(status=ATTACK))
    html = build_seed_report(runs[0].parent / "study", runs).read_text()
    assert html.count("&lt;script&gt;") == 2
    assert Page(html).all("script") == []


def test_settings_that_differ_are_listed(runs: list[Path]) -> None:
    change(runs[2] / "ppo_lora/run.json", lambda r: r["config"].update(learning_rate=1e-5))
    change(runs[0] / "ppo_full/run.json", lambda r: r["config"]["lora"].update(r=8))
    change(runs[1] / "reward/run.json", lambda r: r["config"].update(reward_model_path="/data/runs/other/reward"))
    said = seeds.setting_differences(read_runs(runs)[0])
    assert said == [
        "Reward model, reward_model_path: RUN/reward in study-1 and study-3; /data/runs/other/reward in study-2",
        "PPO, full, lora.r: 8 in study-1; 16 in study-2 and study-3",
        "PPO, LoRA, learning_rate: 3e-06 in study-1 and study-2; 1e-05 in study-3",
    ]
    assert said[2] in page_of(runs)


def test_runs_with_the_same_seed_are_not_called_seeds(runs: list[Path]) -> None:
    change(runs[1] / "ppo_lora/run.json", lambda r: r.update(seed=1))
    text = page_of(runs)
    assert "PPO, LoRA: study-1 and study-2 have the same seed, 1: they count as one sample, not 2." in text
    assert "over 3 runs LoRA minus full" in text


def test_copies_of_one_run_are_refused(runs: list[Path]) -> None:
    """The same ids, or the same seeds and results: no spread, and no conclusion from it."""
    copies = [runs[0].with_name(name) for name in ("a", "b", "c")]
    for path in copies:
        shutil.copytree(runs[0], path)
    with pytest.raises(UserError, match="expected different runs, found copies: b is a copy of a: its results are lef"):
        build_seed_report(runs[0].parent / "study", copies)
    for i, path in enumerate(copies):  # computed again: other ids and times, the same numbers
        for stage in STAGES:
            change(path / stage / "run.json", lambda r, i=i: r.update(id=f"start {i}", seconds=5.0 + i))
        for method in ("full", "lora"):
            rows = [ppo_row(step, 0.05) | {"time/act": step * i, "eps": i + 0.5} for step in range(1, 9)]
            write(path / f"ppo_{method}/metrics.jsonl", rows)
    with pytest.raises(UserError, match="c is a copy of a: its results are left out"):
        build_seed_report(runs[0].parent / "study", copies)
    assert not (runs[0].parent / "study").exists()


def test_a_copy_among_others_is_left_out(runs: list[Path]) -> None:
    """Two runs and a copy are two runs: 1 and 2, mean 1.5, half of 12.7062 * 0.5."""
    copy = runs[0].with_name("copy")
    shutil.copytree(runs[0], copy)
    text = page_of([*runs[:2], copy])
    assert "copy is a copy of study-1: its results are left out." in text
    assert "Gain in mean reward, full 2 +1.500 [-4.853, +7.853] +1.000 +2.000 –" in text
    assert "over 2 seeds +1.500 on average" in text  # the copy does not make them runs of equal seeds
    assert "have the same seed" not in text


def test_a_stage_that_runs_share_counts_once(runs: list[Path]) -> None:
    """PPO with other seeds on one reward model, whose accuracy is one value; and policies that were evaluated twice."""
    for path in runs:
        change(path / "reward/run.json", lambda r: r.update(id="one", seed=1))
    text = page_of(runs)
    assert "Reward model of study-3 is a copy of the one of study-1: its results are left out." in text
    assert "Reward model, accuracy 1 65.5% 65.5% – –" in text
    assert "Gain in mean reward, full 3 +2.000" in text
    for path in runs[:2]:
        change(path / "ppo_full/run.json", lambda r: r.update(id="same policy"))
    text = page_of(runs)
    assert "Gain in mean reward, full 2 +2.000" in text
    assert "Gain in mean reward, LoRA 3 +2.000" in text


def test_what_is_not_done_is_left_out(runs: list[Path]) -> None:
    change(runs[0] / "evaluation/run.json", lambda r: r.update(status="failed"))
    shutil.rmtree(runs[1] / "evaluation")
    text = page_of(runs)
    assert "study-1 done, seed 1 not run done, seed 1 done, seed 1 failed, seed 1" in text
    assert "one run has both, LoRA minus full -0.500: a second run is needed to compare seeds." in text
    assert "Gain in mean reward, full 1 +3.000 – – +3.000" in text
    shutil.rmtree(runs[2] / "evaluation")
    for path in runs:
        shutil.rmtree(path / "ppo_lora")
    assert "No run has finished results of both full fine-tuning and LoRA, so they are not compared." in page_of(runs)


def test_runs_that_cannot_be_gathered(runs: list[Path], tmp_path: Path) -> None:
    for run_dirs, message in [
        (runs[:1], "expected at least two runs, found 1"),
        ([runs[0], runs[1], runs[0]], "expected different runs, found study-1 twice"),
        ([runs[0], tmp_path / "none"], r"none: expected a run folder, found none"),
    ]:
        with pytest.raises(UserError, match=message):
            build_seed_report(tmp_path / "study", run_dirs)
    for stage in STAGES[1:]:
        shutil.rmtree(runs[0] / stage)
    shutil.rmtree(runs[1] / "reward")
    with pytest.raises(
        UserError, match=r"in common, found study-1 \(reward\), study-2 \(ppo_full ppo_lora evaluation\)"
    ):
        build_seed_report(tmp_path / "study", runs[:2])
    assert not (tmp_path / "study").exists()


def test_mean_curve_is_at_the_steps_that_all_have() -> None:
    curves = [{1.0: 1.0, 2.0: 5.0, 3.0: 9.0}, {1.0: 2.0, 2.0: 5.0}, {2.0: 5.0, 1.0: 3.0}]
    (one, mean, low, high), (two, *flat) = seed_plots.mean_curve(curves)
    assert (one, mean, two, flat) == (1, 2, 2, [5, 5, 5])
    assert (low, high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert seed_plots.mean_curve(curves[:1]) == []


def test_plots_show_every_run_and_the_mean() -> None:
    histories = {"full": [[ppo_row(i, kl) for i in (1, 2)] for kl in (0.02, 0.04)], "lora": [[ppo_row(1, 0.03)]]}
    figure = seed_plots.kl(histories)
    shown = [line.get_ydata() for line in figure.axes[0].get_lines()]
    assert [list(values) for values in shown] == [[0.02, 0.02], [0.04, 0.04], [0.03, 0.03], [0.03]]
    assert {"full, mean", "LoRA"} <= set(lines(figure))  # one curve has no mean, and its own name
    assert figure.axes[0].get_ylim()[1] < 0.2  # the interval, 0.03 +- 0.127, does not stretch the plot
    assert lines(seed_plots.scores(histories))["full, mean"][1] == pytest.approx([1 / 40, 1.5 / 40])


def test_gains_are_joined_by_run() -> None:
    full, lora = (seeds.summary_of("", "signed", values) for values in ([1.0, 2.0, 3.0], [1.5, None, 2.5]))
    assert full
    assert lora
    figure = seed_plots.gains(["a$1$", "b", "c"], {"full": full, "lora": lora})
    axis = figure.axes[0]
    joined = [one for one in axis.get_lines() if one.get_label() == "_run"]
    assert [(list(one.get_xdata()), list(one.get_ydata())) for one in joined] == [
        ([1, 1.5], [0, 0]),
        ([2], [1]),
        ([3, 2.5], [2, 2]),
    ]
    shown = lines(figure)
    assert shown["LoRA"] == ([1.5, 2.5], [0, 2])
    assert shown["_full interval"][0] == pytest.approx([2 - 2.4841, 2 + 2.4841], abs=1e-4)
    assert [text.get_text() for text in axis.texts] == ["a$1$", "b", "c", "mean, 95% interval"]


def call(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        run_script(report.main)
    return int(str(stop.value.code))


def test_script(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [path.name for path in runs]
    assert call(monkeypatch, "--runs_dir", tmp_path, "--run", "study", "--runs", *names) == 0
    said = capsys.readouterr().out
    assert said.startswith("Report on all runs  ")
    assert "/study/report/seeds.html, seeds.pdf" in said
    text = " ".join(page.extract_text() for page in PdfReader(tmp_path / "study/report/seeds.pdf").pages)
    assert "no difference beyond the spread" in " ".join(text.split())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--runs", "study-1", "study-2"], "run: give --run a name for the folder of this report"),
        (["--run", "study", "--runs", "study-1", "study-9"], "study-9: expected a run folder, found none"),
        (["--run", "study", "--runs", "study-1"], "runs: expected at least two runs, found 1"),
        (["--run", "study", "--runs", "study-1", "../x"], "runs: expected a plain folder name"),
    ],
)
def test_script_answers_mistakes_in_one_line(
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    words: str,
) -> None:
    assert call(monkeypatch, "--runs_dir", tmp_path, *argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert not (tmp_path / "study").exists()


def test_two_stages_without_results_are_no_copies(runs: list[Path]) -> None:
    """Of the same seed, but nothing was logged that could be the same."""
    for path in runs[:2]:
        change(path / "reward/run.json", lambda r: r.update(seed=1))
        (path / "reward/metrics.jsonl").unlink()
    assert seeds.copies([read_run(path) for path in runs]) == {}
    assert "Reward model: study-1 and study-2 have the same seed, 1" in page_of(runs)


def test_a_run_made_of_two_others_is_named_stage_by_stage(runs: list[Path]) -> None:
    both = shutil.copytree(runs[0], runs[0].with_name("both"))
    shutil.rmtree(both / "ppo_lora")
    shutil.copytree(runs[1] / "ppo_lora", both / "ppo_lora")
    found = [read_run(path) for path in (*runs[:2], both)]
    assert seeds.copy_words(found, seeds.copies(found)) == [
        "Reward model of both is a copy of the one of study-1: its results are left out",
        "PPO, full of both is a copy of the one of study-1: its results are left out",
        "PPO, LoRA of both is a copy of the one of study-2: its results are left out",
        "Evaluation of both is a copy of the one of study-1: its results are left out",
    ]


def test_other_numbers_or_another_seed_are_no_copy(runs: list[Path]) -> None:
    twin = shutil.copytree(runs[0], runs[0].with_name("twin"))
    for stage in STAGES:
        change(twin / stage / "run.json", lambda r: r.update(seed=9))
    assert seeds.copies([read_run(runs[0]), read_run(twin)]) == {}
    for stage in STAGES:
        change(twin / stage / "run.json", lambda r: r.update(seed=1))
    change(twin / "evaluation/evaluation.json", lambda e: e["gains"]["lora"].update(gain=9.0))
    write(twin / "ppo_full/metrics.jsonl", [ppo_row(i, 0.01) for i in range(1, 9)])
    assert seeds.copies([read_run(runs[0]), read_run(twin)]) == {"twin": {"reward": "study-1", "ppo_lora": "study-1"}}


def test_a_curve_is_the_mean_of_so_many_rows_and_the_last_row_of_a_step_counts() -> None:
    rows: list[dict[str, float]] = [{"step": i, "y": y} for i, y in ((1, 1.0), (2, 9.0), (2, 3.0), (3, 8.0))]
    assert seed_plots.curve(rows, "y") == {1: 1, 2: 3, 3: 8}
    assert seed_plots.curve(rows, "y", 2) == {1: 1, 2: 2, 3: 5.5}


def test_runs_without_a_difference_are_not_counted_among_those_that_have_one(runs: list[Path]) -> None:
    made = seeds.summary_of("Gain", "signed", [0.5, None, 1.5])
    assert made
    (row,) = seed_report._compared([read_run(path) for path in runs], [made]).rows
    assert [row[:2], row[4:]] == [["Gain", "2"], ["+0.500", "–", "+1.500"]]
    (row,) = seed_report._values([read_run(path) for path in runs], [made]).rows
    assert [row[:2], row[3:]] == [["Gain", "2"], ["+0.500", "–", "+1.500"]]


def test_the_plot_of_the_kl_shows_0_and_the_whole_band() -> None:
    low, high = seed_plots.kl({"full": [[ppo_row(i, 0.05) for i in (1, 2)]]}).axes[0].get_ylim()
    assert (low, high) == pytest.approx((-0.03, 0.13))


def test_a_reward_model_that_was_computed_again_is_a_copy(runs: list[Path]) -> None:
    """What counts are the results after training, and not how long they took."""
    for i, path in enumerate(runs[:2]):
        write(path / "reward_gold/run.json", run_json("reward_gold") | {"seed": 1, "id": f"start {i}"})
        write(path / "reward_gold/evaluation.json", {"before": {"accuracy": 0.4 + i}, "after": {"accuracy": 0.6}})
        change(path / "reward/run.json", lambda r: r.update(seed=1))
        times = dict.fromkeys(("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"), i + 0.5)
        times |= {"perf/x": i, "time/y": i, "eps": i}
        write(path / "reward/metrics.jsonl", [{"step": 1, "eval_loss": 0.5} | times])
    found = [read_run(path) for path in runs[:2]]
    assert seeds.copies(found) == {"study-2": {"reward": "study-1", "reward_gold": "study-1"}}
    write(runs[1] / "reward_gold/evaluation.json", {"before": {"accuracy": 0.4}, "after": {"accuracy": 0.7}})
    assert seeds.copies([read_run(path) for path in runs[:2]]) == {"study-2": {"reward": "study-1"}}
    without = seeds.without_copies(found, {"study-2": {"reward": "study-1"}})
    assert (without[1].reward, without[1].reward_log) == ({}, [])
    assert without[0] is found[0]


def test_only_results_of_finished_stages_are_kept(runs: list[Path]) -> None:
    for stage in ("reward", "ppo_lora"):
        change(runs[0] / stage / "run.json", lambda r: r.update(status="failed"))
    run = seeds.finished(read_run(runs[0]))
    assert (run.reward, run.reward_log, list(run.ppo)) == ({}, [], ["full"])
    assert run.evaluation["gains"]
    change(runs[0] / "evaluation/run.json", lambda r: r.update(status="failed"))
    assert seeds.finished(read_run(runs[0])).evaluation == {}


def test_settings_and_seeds_that_are_not_there(runs: list[Path]) -> None:
    change(runs[1] / "reward/run.json", lambda r: r["config"].update(extra={"x": 1}))
    for path in runs[:2]:
        change(path / "ppo_full/run.json", lambda r: r.update(seed=None))
    found = [read_run(path) for path in runs]
    said = [line for line in seeds.setting_differences(found) if "extra" in line]
    assert said == ["Reward model, extra.x: not set in study-1 and study-3; 1 in study-2"]
    assert seeds.same_seeds(found) == []


def test_a_t_test_needs_two_values_that_differ() -> None:
    assert seeds.t_interval([1.0]) is seeds.t_p_value([1.0]) is seeds.t_p_value([1.0, 1.0]) is None


def test_each_measure_is_read_from_its_own_place(runs: list[Path]) -> None:
    def edit(found: Any) -> None:
        found["models"]["lora"].update(mean_reward=9.0, eos_rate=0.25)
        found["validity"] = {"full": {"gold": {"gain": 7.0}}}

    change(runs[0] / "evaluation/evaluation.json", edit)
    run = read_run(runs[0])
    assert seeds.measure(run, "gold_gain", "full") == 7
    assert seeds.measure(run, "gold_gain", "lora") is None
    assert (seeds.measure(run, "mean_reward", "lora"), seeds.measure(run, "eos_rate", "lora")) == (9, 0.25)
    assert seeds.measure(run, "kl_per_token", "base") is None
    by_name = {row.name: row.values for row in seeds.differences([run])}
    assert by_name["EOS rate (share)"] == [0.25 - 0.9]
    assert by_name["Gain in mean reward"] == [0.5]
    assert "Gain by the second reward model" not in by_name


def test_learning_curves_and_gains_of_several_runs() -> None:
    logs = [[{"step": i, "eval_loss": x / i, "eval_accuracy": x / 8} for i in (1, 2)] for x in (1.0, 3.0)]
    for key, unit, mean in (("loss", "validation pair", [2, 1]), ("accuracy", "validation pairs", [0.25, 0.25])):
        figure = seed_plots.learning(logs, key)
        assert figure.texts[1].get_text().endswith(unit)
        assert lines(figure)["validation, mean"] == ([1, 2], mean)
    full, lora = (seeds.summary_of("", "signed", values) for values in ([1.0, 2.0], [1.0, 1.0]))
    assert full
    assert lora
    shown = lines(seed_plots.gains(["a", "b"], {"full": full, "lora": lora}))
    assert (shown["_full mean"], shown["_lora mean"]) == (([1.5], [2]), ([1], [2.16]))
    assert "_lora interval" not in shown  # equal values
    assert shown["_place"][0] == [0, 0]
