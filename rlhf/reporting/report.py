"""The report: one self-contained HTML page and its plots, from the files of a run folder alone.

`read_run` reads and checks, `draw` plots, `render` makes the page; `build_report` puts them on disk. The
words are in report.html.j2. What a stage has not written is said to be missing, never guessed.
"""

import base64
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from matplotlib.figure import Figure

from rlhf.file_types import ResponseRow
from rlhf.functional.gae import gae
from rlhf.functional.losses import pairwise_margin_ranking_loss, policy_loss
from rlhf.reporting import conclusions
from rlhf.reporting.plots import evaluation as evaluation_plots
from rlhf.reporting.plots import training as plots
from rlhf.reporting.run import Run, labels, read_run
from rlhf.storage.run_folder import write_bytes
from rlhf.storage.stages import TITLES

N_SAMPLES = 8  # prompts whose responses are shown side by side
N_FIRST = 6  # logged rows shown as tables
N_TROUBLES = 20  # warnings and left-out updates shown of a run
LISTED = (pairwise_margin_ranking_loss, gae, policy_loss)  # the code that matters, as it is in this installation


def build_report(run_dir: Path, title: str | None = None, author: str | None = None) -> Path:
    """Write run_dir/report/report.html and one NAME.png a plot; return the page's path.

    title, author: for the heading, and for the file's name where one is given.

    Each file appears whole or not at all. Raises UserError for a run folder that is not there and for a file
    in it that cannot be read as what it should be (names the file, and the line of a .jsonl).
    """
    run = read_run(Path(run_dir))
    images = {name: plots.to_png(figure) for name, figure in draw(run).items()}
    page = render(run, images, title, author)
    return write_page(run.path / "report" / f"{file_stem(title, author)}.html", page, images)


def write_page(path: Path, page: str, images: Mapping[str, bytes]) -> Path:
    """Write a page, and its plots (name -> PNG bytes) beside it, each whole or not at all; return the page's path."""
    for name, image in images.items():
        write_bytes(path.with_name(f"{name}.png"), image)
    # Half a surrogate pair is valid in JSON but not in UTF-8: one such character must not cost the page.
    write_bytes(path, page.encode("utf-8", "replace"))
    return path


def file_stem(title: str | None, author: str | None) -> str:
    """A file name of author and title, plain letters only; "report" where there are none."""
    words = re.findall(r"[A-Za-z0-9]+", f"{author or ''} {title or ''}")
    return "_".join(words)[:100] or "report"


def draw(run: Run) -> dict[str, Figure]:
    """Return the plots for which the run has data, by file name without ending."""
    figures: dict[str, Figure] = {}
    reward, bins = run.reward, run.reward.get("calibration", {}).get("bins")
    if run.reward_log:
        figures["reward_learning"] = plots.learning_curves(run.reward_log, reward.get("best", {}).get("step"))
    if reward.get("confusion_matrix"):
        figures["reward_confusion"] = plots.confusion_matrix(reward["confusion_matrix"], labels(reward))
    if bins:
        figures["reward_calibration"] = plots.calibration(bins, reward["calibration"].get("ece"))
    if run.ppo:
        figures["ppo_kl"] = plots.kl(run.ppo)
        figures["ppo_scores"] = plots.scores(run.ppo)
        figures["ppo_scores_kl"] = plots.scores_against_kl(run.ppo)
        figures["ppo_responses"] = plots.response_shape(run.ppo)
    gains = {name: record for name, record in run.evaluation.get("gains", {}).items() if record}
    if gains:
        figures["evaluation_gains"] = plots.gains(gains, run.evaluation.get("confidence", 0.95))
    validity = {name: record for name, record in run.evaluation.get("validity", {}).items() if record.get("gold")}
    if validity:
        figures["evaluation_gold"] = evaluation_plots.proxy_and_gold(validity)
    if any(plots.is_number(row.get("response_length")) for row in run.responses):
        figures["evaluation_length"] = evaluation_plots.score_against_length(run.responses)
    return figures


def environment() -> Environment:
    """What every page of the report is made with: the templates beside this file, and filters for numbers."""
    made = Environment(
        # Every text of a model, a data set or a config is escaped; what was not written shows as a dash.
        autoescape=True,
        undefined=ChainableUndefined,
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"num": _num, "signed": _signed, "percent": _percent, "duration": _duration}
    made.filters["flat"] = lambda record: list(flat(record))
    made.filters["named"] = lambda keys, names: [names.get(key, key) for key in keys]
    return made


def render(run: Run, images: Mapping[str, bytes], title: str | None = None, author: str | None = None) -> str:
    """Return the page. images: plot name -> PNG bytes, put into the page; one not given is left out."""
    gains = run.evaluation.get("gains", {})
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            title=title or f"RLHF run {run.path.resolve().name}",
            author=author,
            first_rows=N_FIRST,
            most_troubles=N_TROUBLES,
            example=gain_example(run),
            listings=[(f.__name__, inspect.getsource(f)) for f in LISTED],
            stage_names=TITLES,
            model_names=plots.NAMES,
            labels=labels(run.reward),
            images={name: base64.b64encode(image).decode() for name, image in images.items()},
            band=plots.KL_BAND,
            kl={name: conclusions.kl_conclusion(rows) for name, rows in run.ppo.items()},
            kl_rules=conclusions.KL_RULES,
            gain_words={name: conclusions.gain_conclusions(run.evaluation, name) for name in gains},
            gain_rules=conclusions.GAIN_RULES,
            smooth=plots.SMOOTH,
            samples=choose_samples(run.responses),
            rated=choose_samples(run.rating_responses, count=len(run.rating_responses)),
        )
    )


def gain_example(run: Run) -> dict[str, object] | None:
    """The first prompt that base and a tuned model answered, with both scores; None without one."""
    for answers in choose_samples(run.responses, count=len(run.responses)):
        tuned = next((name for name in answers if name != "base"), None)
        if tuned and "base" in answers:
            before, after = answers["base"].get("score"), answers[tuned].get("score")
            if plots.is_number(before) and plots.is_number(after):
                prompt_id = answers["base"].get("prompt_id")
                return {
                    "model": tuned,
                    "prompt_id": prompt_id,
                    "before": before,
                    "after": after,
                    "gain": after - before,
                }
    return None


def choose_samples(responses: Sequence[ResponseRow], count: int = N_SAMPLES) -> list[dict[str, ResponseRow]]:
    """Return up to count prompts' responses, each as model -> row, evenly spaced in the file's prompt order.

    The choice does not look at scores, so that the page does not show the best ones only. Where a prompt and
    model come twice (a stage that was rerun), the later row counts.
    """
    prompts: dict[str, dict[str, ResponseRow]] = {}
    for row in responses:
        prompts.setdefault(str(row.get("prompt_id")), {})[str(row.get("model"))] = row
    groups = list(prompts.values())
    shown = min(count, len(groups))
    return [groups[i * len(groups) // shown] for i in range(shown)]


def flat(record: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield ("outer.inner", value) for each leaf of a nested record, in its order."""
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, (*prefix, str(key)))
        else:
            yield ".".join((*prefix, str(key))), value


def _num(value: Any, digits: int = 3) -> str:
    """Return a number for a reader: 1,234 or digits places, small ones 3 significant digits; "–" for none."""
    if not plots.is_number(value):
        return "–" if value is None or isinstance(value, ChainableUndefined) else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:,.{digits}f}"


def _signed(value: Any) -> str:
    return ("+" if plots.is_number(value) and value > 0 else "") + _num(value)


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}%" if plots.is_number(value) else _num(value)


def _duration(seconds: Any) -> str:
    if not plots.is_number(seconds) or seconds < 60:
        return _num(seconds, 1) + (" s" if plots.is_number(seconds) else "")
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
