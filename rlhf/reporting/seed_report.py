"""The report of several runs: one self-contained page, its plots, and sentences on what the numbers show.

Numbers come from seeds.py, words are in seeds.html.j2. Missing results are left out, never guessed.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rlhf.errors import UserError
from rlhf.reporting import seeds
from rlhf.reporting.plots import seeds as seed_plots
from rlhf.reporting.plots import training as plots
from rlhf.reporting.report import environment, write_page
from rlhf.reporting.run import Run, read_run
from rlhf.reporting.values import KL_BAND, NAMES, SMOOTH
from rlhf.storage.stages import STAGES, TITLES


def build_seed_report(
    folder: Path, run_dirs: Sequence[Path], title: str | None = None, author: str | None = None
) -> Path:
    """Write folder/report/seeds.html and one seeds_NAME.png per plot; return the page's path.

    folder: is created if missing; run_dirs: the run folders. Raises UserError for fewer than two runs, a run that is
    missing or given twice, a file that cannot be read, and runs without a finished stage in common.
    """
    runs = read_runs(run_dirs)
    images = {f"seeds_{name}": plots.to_png(figure) for name, figure in draw(runs).items()}
    page = render(runs, images, title or f"{folder.resolve().name}: {len(runs)} runs", author)
    return write_page(folder / "report" / "seeds.html", page, images)


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Read the runs, keeping the results of finished stages only."""
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
    return runs


def draw(runs: Sequence[Run]) -> dict[str, Figure]:
    """The plots for which some run has data, by name."""
    figures: dict[str, Figure] = {}
    logs = [run.reward_log for run in runs if run.reward_log]
    histories = {name: [run.ppo[name] for run in runs if name in run.ppo] for name in ("full", "lora")}
    histories = {name: rows for name, rows in histories.items() if rows}
    if logs:
        figures["reward"] = seed_plots.learning(logs)
    if histories:
        figures["scores"] = seed_plots.scores(histories)
        figures["kl"] = seed_plots.kl(histories)
    gains = seeds.gains(runs)
    if gains:
        figures["gains"] = seed_plots.gains([run.path.name for run in runs], gains)
    return figures


def render(runs: Sequence[Run], images: Mapping[str, bytes], title: str, author: str | None = None) -> str:
    """Return the page. images: plot name -> PNG bytes, embedded in the page; figures without an image are left out."""
    made = environment()
    made.filters["shown"] = lambda value, form: made.filters[form](value)
    same = seeds.same_seeds(runs)
    return made.get_template("seeds.html.j2").render(
        title=title,
        author=author,
        runs=runs,
        names=[run.path.name for run in runs],
        stage_names=TITLES,
        model_names=NAMES,
        draws="runs" if same else "seeds",  # with equal seeds among them, they are not a sample of seeds
        same_seeds=same,
        setting_differences=seeds.setting_differences(runs),
        gains=seeds.gains(runs),
        summaries=seeds.summaries(runs),
        differences=seeds.differences(runs),
        confidence=f"{seeds.CONFIDENCE:.0%}",
        band=KL_BAND,
        smooth=SMOOTH,
        images={name: base64.b64encode(image).decode() for name, image in images.items()},
    )
