"""The report of several runs: one self-contained page, its plots, and sentences on what the numbers show.

Numbers come from seeds.py, words are in seeds.html.j2. Missing results are left out, never guessed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rlhf.errors import UserError
from rlhf.reporting import formats, seeds
from rlhf.reporting.plots import seeds as seed_plots
from rlhf.reporting.plots.style import to_svg
from rlhf.reporting.report import encodable, environment, pngs, write_page
from rlhf.reporting.run import Run, read_run
from rlhf.reporting.seeds import Summary
from rlhf.reporting.tables import Table
from rlhf.reporting.values import KL_BAND, NAMES, SMOOTH
from rlhf.storage.stages import STAGES, TITLES


def build_seed_report(
    folder: Path, run_dirs: Sequence[Path], title: str | None = None, author: str | None = None
) -> Path:
    """Write folder/report/seeds.html and one seeds_NAME.png per plot; return the page's path.

    folder: is created if missing; run_dirs: the run folders. Raises UserError for fewer than two runs, a run that is
    missing or given twice, a file that cannot be read, runs without a finished stage in common, and copies of one run.
    """
    page, images = make_seed_page(folder, run_dirs, title, author)
    return write_page(folder / "report" / "seeds.html", page, images)


def make_seed_page(
    folder: Path, run_dirs: Sequence[Path], title: str | None = None, author: str | None = None
) -> tuple[str, dict[str, bytes]]:
    """The page of `build_seed_report` and its plots as PNG, by name; nothing is written."""
    runs, copies = read_runs(run_dirs)
    figures = {f"seeds_{name}": figure for name, figure in draw(runs).items()}
    page = render(runs, figures, title or f"{folder.resolve().name}: {len(runs)} runs", author, copies)
    return page, pngs(figures)


def read_runs(run_dirs: Sequence[Path]) -> tuple[list[Run], seeds.Copies]:
    """Read the runs, keeping the results of finished stages only, and each result once; and which were copies."""
    if len(run_dirs) < 2:
        raise UserError(f"runs: expected at least two runs, found {len(run_dirs)}")
    for i, path in enumerate(run_dirs):
        if path.resolve() in [other.resolve() for other in run_dirs[:i]]:
            raise UserError(f"runs: expected different runs, found {path.name} twice")
    runs = [seeds.finished(read_run(path)) for path in run_dirs]
    if not any(sum(seeds.done(run, stage) for run in runs) > 1 for stage in STAGES):
        found = ", ".join(
            f"{run.path.name} ({' '.join(stage for stage in STAGES if seeds.done(run, stage)) or 'none'})"
            for run in runs
        )
        raise UserError(f"runs: expected a finished stage in common, found {found}")
    copies = seeds.copies(runs)
    kept = seeds.without_copies(runs, copies)
    if copies and not any(summary.n > 1 for summary in seeds.summaries(kept)):
        raise UserError(f"runs: expected different runs, found copies: {'; '.join(seeds.copy_words(runs, copies))}")
    return kept, copies


def draw(runs: Sequence[Run]) -> dict[str, Figure]:
    """The plots for which some run has data, by name."""
    figures: dict[str, Figure] = {}
    logs = [run.reward_log for run in runs if run.reward_log]
    histories = {name: [run.ppo[name] for run in runs if name in run.ppo] for name in ("full", "lora")}
    histories = {name: rows for name, rows in histories.items() if rows}
    gains = seeds.gains(runs)
    if gains:
        figures["gains"] = seed_plots.gains([run.path.name for run in runs], gains)
    if histories:
        figures["scores"] = seed_plots.scores(histories)
        figures["kl"] = seed_plots.kl(histories)
    if logs:
        figures["loss"] = seed_plots.learning(logs, "loss")
        figures["accuracy"] = seed_plots.learning(logs, "accuracy")
    return figures


def render(
    runs: Sequence[Run],
    figures: Mapping[str, Figure],
    title: str,
    author: str | None = None,
    copies: seeds.Copies | None = None,
) -> str:
    """Return the page. figures: by name, drawn into the page; copies: stages whose results were left out."""
    same = seeds.same_seeds(runs, copies)
    return encodable(
        environment()
        .get_template("seeds.html.j2")
        .render(
            title=title,
            author=author,
            runs=runs,
            stages=_stages(runs),
            model_names=NAMES,
            draws="runs" if same else "seeds",  # with equal seeds among them, they are not a sample of seeds
            same_seeds=same,
            copies=seeds.copy_words(runs, copies or {}),
            setting_differences=seeds.setting_differences(runs),
            gains=seeds.gains(runs),
            differences=seeds.differences(runs),
            values=_values(runs, seeds.summaries(runs)),
            compared=_compared(runs, seeds.differences(runs)),
            confidence=f"{seeds.CONFIDENCE:.0%}",
            band=KL_BAND,
            smooth=SMOOTH,
            plots={name: to_svg(figure, name) for name, figure in figures.items()},
        )
    )


def _stages(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        row = [run.path.name]
        for stage in STAGES:
            info = run.stages.get(stage)
            seed = "–" if info is None or info.get("seed") is None else str(info["seed"])
            row.append("not run" if info is None else f"{formats.num(info.get('status'))}, seed {seed}")
        rows.append(row)
    note = "Results of unfinished stages are not used below."
    return Table("Each stage's status and seed", ["Run", *(TITLES[stage] for stage in STAGES)], rows, 99, note)


def _values(runs: Sequence[Run], summaries: Sequence[Summary]) -> Table:
    rows = []
    for row in summaries:
        form = getattr(formats, row.form)
        rows.append([row.name, str(row.n), formats.with_ends(row.mean, row.interval, form), *map(form, row.values)])
    level = f"{seeds.CONFIDENCE:.0%}"
    return Table(
        "Every run's value, and their mean",
        ["Quantity", "n", f"Mean [{level}]", *(run.path.name for run in runs)],
        rows,
        note="n: runs with a value. Interval of the mean: Student's t over the runs, which assumes roughly normal "
        "values; for a share it can go beyond 0 or 100%. Accuracy: on pairs that the reward model was not trained on. "
        "KL at the end: mean of objective/kl_per_token over the last quarter of the PPO steps. A single run has no "
        "interval. If each run has its own reward model, rewards are on that model's scale.",
    )


def _compared(runs: Sequence[Run], differences: Sequence[Summary]) -> Table:
    rows = []
    for row in differences:
        mean = formats.with_ends(row.mean, row.interval, formats.signed)
        values = [formats.signed(value) for value in row.values]
        rows.append([row.name, str(row.n), mean, formats.num(row.p_value), *values])
    level = f"{seeds.CONFIDENCE:.0%}"
    return Table(
        "LoRA minus full, run by run",
        ["Quantity", "n", f"Mean [{level}]", "p-value", *(run.path.name for run in runs)],
        rows,
        note="Differences are taken within each run. Interval: Student's t over the differences; p-value: two-sided "
        "paired t test. With few runs, both detect large differences only: an interval that includes 0 does not show "
        "that there is no difference.",
    )
