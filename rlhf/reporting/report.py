"""The report: one self-contained HTML page and its plots, from the files of a run folder alone.

`read_run` reads and checks, `draw` plots, `render` makes the page; `build_report` puts them on disk. The
words are in report.html.j2. Results that a stage has not written are reported as missing, never guessed.
"""

import ast
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from matplotlib.figure import Figure

from rlhf.reporting import conclusions, formats, samples, tables
from rlhf.reporting.examples import examples
from rlhf.reporting.plots import evaluation as evaluation_plots
from rlhf.reporting.plots import training as plots
from rlhf.reporting.plots.style import to_png, to_svg
from rlhf.reporting.run import Run, labels, read_run
from rlhf.reporting.values import KL_BAND, NAMES, SMOOTH, is_number
from rlhf.storage.disk import write_bytes
from rlhf.storage.stages import TITLES, stale_lines

# Functions whose source the report shows: file below the package, and name.
LISTED = (
    ("functional/losses.py", "pairwise_margin_ranking_loss"),
    ("functional/gae.py", "gae"),
    ("functional/losses.py", "policy_loss"),
)
_LABELLERS = {
    "demo:": "the authors of the demo's pairs",
    "Anthropic/hh-rlhf": "the crowd workers of HH-RLHF",
}
_LONGEST_STEM = 120  # bytes of UTF-8


def build_report(run_dir: Path, title: str | None = None, author: str | None = None) -> Path:
    """Write run_dir/report/report.html and one NAME.png per plot; return the page's path.

    title, author: for the heading; if given, they also name the file. Files are written atomically. Raises UserError
    for a missing run folder, and for a malformed file in it, naming the file and the line of a .jsonl.
    """
    run = read_run(Path(run_dir))
    figures = draw(run)
    page = render(run, figures, title, author)
    return write_page(run.path / "report" / f"{file_stem(title, author)}.html", page, pngs(figures))


def write_page(path: Path, page: str, images: Mapping[str, bytes]) -> Path:
    """Write a page and its plots (name -> PNG bytes) beside it, each atomically; return the page's path."""
    for name, image in images.items():
        write_bytes(path.with_name(f"{name}.png"), image)
    write_bytes(path, page.encode("utf-8"))
    return path


def file_stem(title: str | None, author: str | None) -> str:
    """A file name from author and title, letters and digits of any script only; "report" without either."""
    text = unicodedata.normalize("NFC", f"{author or ''} {title or ''}")  # as file systems have names
    stem = "_".join(re.findall(r"[^\W_]+", text))
    return stem.encode("utf-8")[:_LONGEST_STEM].decode("utf-8", "ignore") or "report"


def pngs(figures: Mapping[str, Figure]) -> dict[str, bytes]:
    """Each plot as the bytes of a PNG file."""
    return {name: to_png(figure) for name, figure in figures.items()}


def draw(run: Run) -> dict[str, Figure]:
    """Return the plots for which the run has data, by file name without ending."""
    figures: dict[str, Figure] = {}
    gains = {name: record for name, record in run.evaluation.get("gains", {}).items() if record}
    if run.ppo:
        figures["ppo_scores"] = plots.scores(run.ppo)
        figures["ppo_kl"] = plots.kl(run.ppo)
    if gains:
        checks: Mapping[str, Any] = run.evaluation.get("validity", {})
        gold = {name: (record or {}).get("gold") or {} for name, record in checks.items()}
        figures["evaluation_gains"] = evaluation_plots.gains(gains, gold, run.evaluation.get("confidence", 0.95))
    figures |= _draw_reward(run)
    if run.ppo:
        curves = {name: plots.curve(run.ppo, name) for name in plots.CURVES}
        figures |= {name: figure for name, figure in curves.items() if figure}
        figures["ppo_scores_kl"] = plots.scores_against_kl(run.ppo)
    if any(is_number(row.get("response_length")) for row in run.responses):
        figures["evaluation_length"] = evaluation_plots.score_against_length(run.responses)
    return figures


def _draw_reward(run: Run) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    reward, calibration = run.reward, run.reward.get("calibration", {})
    groups = tables.reward_groups(run)
    if run.reward_log:
        best = reward.get("best", {}).get("step")
        figures["reward_loss"] = plots.reward_loss(run.reward_log, best)
        figures["reward_accuracy"] = plots.reward_accuracy(run.reward_log, best)
    if groups:
        figures["reward_groups"] = plots.accuracies(groups)
    if calibration.get("bins"):
        figures["reward_calibration"] = plots.calibration(calibration["bins"], calibration.get("ece"))
    return figures


def environment() -> Environment:
    """The Jinja environment of all report pages: the templates beside this file, and filters for numbers."""
    made = Environment(
        # Texts of models, data sets and configs are escaped; missing values show as a dash.
        autoescape=True,
        undefined=ChainableUndefined,
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["stale_lines"] = stale_lines
    made.filters |= {name: getattr(formats, name) for name in ("num", "signed", "percent", "duration", "short")}
    return made


def render(run: Run, figures: Mapping[str, Figure], title: str | None = None, author: str | None = None) -> str:
    """Return the page. figures: by name, drawn into the page; those that are not there are left out."""
    gains: Mapping[str, Any] = run.evaluation.get("gains", {})
    return encodable(
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            title=title or f"RLHF run {run.path.resolve().name}",
            author=author,
            tables=tables,
            verdict=conclusions.verdict(run.evaluation),
            verdict_rules=conclusions.VERDICT_RULES,
            examples=examples(run),
            listings=listings(),
            labeller=labeller(run),
            stage_names=TITLES,
            model_names=NAMES,
            labels=labels(run.reward),
            plots={name: to_svg(figure, name) for name, figure in figures.items()},
            band=KL_BAND,
            kl={name: conclusions.kl_conclusion(rows) for name, rows in run.ppo.items()},
            kl_rules=conclusions.KL_RULES,
            score_words={
                name: conclusions.score_conclusion(rows, (gains.get(name) or {}).get("gain"))
                for name, rows in run.ppo.items()
            },
            gain_words={name: conclusions.gain_conclusions(run.evaluation, name) for name in gains},
            gain_rules=conclusions.GAIN_RULES,
            smooth=SMOOTH,
            first=samples.first_samples(run.responses),
            first_rule=samples.FIRST_RULE,
            more=samples.more_samples(run.responses),
            more_rule=samples.MORE_RULE,
            n_prompts=len(samples.numbered(run.responses)),
            rated=samples.numbered(run.rating_responses),
        )
    )


def encodable(text: str) -> str:
    """The text without half surrogate pairs, which JSON may hold and UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def labeller(run: Run) -> str:
    """Who chose between the responses of the reward model's pairs, as far as the data source is known."""
    config = run.stages.get("reward", {}).get("config", {})
    source = str(config.get("dataset_name"))
    return next((words for start, words in _LABELLERS.items() if source.startswith(start)), "the data")


def listings() -> list[tuple[str, str]]:
    """(name, source) of the LISTED functions, read and not imported: importing them would load torch."""
    found = []
    for file, name in LISTED:
        text = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
        node = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name)
        lines: Sequence[str] = text.splitlines()[node.lineno - 1 : node.end_lineno]
        found.append((name, "\n".join(lines)))
    return found
