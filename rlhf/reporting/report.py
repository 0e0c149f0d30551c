"""The report: one self-contained HTML page and its plots, from the files of a run folder alone.

`read_run` reads and checks, `draw` plots, `render` makes the page; `build_report` puts them on disk. The
words are in report.html.j2. Results that a stage has not written are reported as missing, never guessed.
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
from rlhf.reporting.values import KL_BAND, NAMES, SMOOTH, is_number
from rlhf.storage.run_folder import write_bytes
from rlhf.storage.stages import TITLES

N_SAMPLES = 8  # prompts whose responses are shown side by side
N_FIRST = 6  # logged rows shown as tables
N_TROUBLES = 20  # warnings and skipped updates shown per stage
REWARD_COLUMNS = {
    "step": "Step",
    "epoch": "Epoch",
    "loss": "Loss",
    "accuracy": "Accuracy",
    "margin": "Margin",
    "eval_loss": "Validation loss",
    "eval_accuracy": "Validation accuracy",
}
PPO_COLUMNS = {
    "step": "Step",
    "objective/scores": "Score",
    "objective/kl_per_token": "KL per token",
    "objective/kl": "KL per response",
    "loss/policy_avg": "Policy loss",
    "loss/value_avg": "Value loss",
    "val/ratio": "Ratio",
    "objective/response_length": "Length",
    "lr": "Learning rate",
}
LISTED = (pairwise_margin_ranking_loss, gae, policy_loss)  # functions whose source the report shows


def build_report(run_dir: Path, title: str | None = None, author: str | None = None) -> Path:
    """Write run_dir/report/report.html and one NAME.png per plot; return the page's path.

    title, author: for the heading; if given, they also name the file. Files are written atomically. Raises UserError
    for a missing run folder, and for a malformed file in it, naming the file and the line of a .jsonl.
    """
    run = read_run(Path(run_dir))
    images = {name: plots.to_png(figure) for name, figure in draw(run).items()}
    page = render(run, images, title, author)
    return write_page(run.path / "report" / f"{file_stem(title, author)}.html", page, images)


def write_page(path: Path, page: str, images: Mapping[str, bytes]) -> Path:
    """Write a page and its plots (name -> PNG bytes) beside it, each atomically; return the page's path."""
    for name, image in images.items():
        write_bytes(path.with_name(f"{name}.png"), image)
    # JSON may hold half a surrogate pair, which UTF-8 cannot encode: replace it rather than fail.
    write_bytes(path, page.encode("utf-8", "replace"))
    return path


def file_stem(title: str | None, author: str | None) -> str:
    """A file name from author and title, ASCII letters and digits only; "report" without either."""
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
    if any(is_number(row.get("response_length")) for row in run.responses):
        figures["evaluation_length"] = evaluation_plots.score_against_length(run.responses)
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
    made.filters |= {"num": _num, "signed": _signed, "percent": _percent, "duration": _duration}
    made.filters["flat"] = lambda record: list(flat(record))
    made.filters["named"] = lambda keys, names: [names.get(key, key) for key in keys]
    return made


def render(run: Run, images: Mapping[str, bytes], title: str | None = None, author: str | None = None) -> str:
    """Return the page. images: plot name -> PNG bytes, embedded in the page; figures without an image are left out."""
    gains = run.evaluation.get("gains", {})
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            title=title or f"RLHF run {run.path.resolve().name}",
            author=author,
            first_rows=N_FIRST,
            reward_columns=REWARD_COLUMNS,
            ppo_columns=PPO_COLUMNS,
            most_troubles=N_TROUBLES,
            example=gain_example(run),
            listings=[(f.__name__, inspect.getsource(f)) for f in LISTED],
            stage_names=TITLES,
            model_names=NAMES,
            labels=labels(run.reward),
            images={name: base64.b64encode(image).decode() for name, image in images.items()},
            band=KL_BAND,
            kl={name: conclusions.kl_conclusion(rows) for name, rows in run.ppo.items()},
            kl_rules=conclusions.KL_RULES,
            gain_words={name: conclusions.gain_conclusions(run.evaluation, name) for name in gains},
            gain_rules=conclusions.GAIN_RULES,
            smooth=SMOOTH,
            samples=choose_samples(run.responses),
            rated=choose_samples(run.rating_responses, count=len(run.rating_responses)),
        )
    )


def gain_example(run: Run) -> dict[str, object] | None:
    """The first prompt with scores of both the base and a tuned model; None if there is none."""
    for answers in choose_samples(run.responses, count=len(run.responses)):
        tuned = next((name for name in answers if name != "base"), None)
        if tuned and "base" in answers:
            before, after = answers["base"].get("score"), answers[tuned].get("score")
            if is_number(before) and is_number(after):
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

    Scores play no part in the choice, so that the page does not show the best ones only. If a prompt and model occur
    twice (a stage that was rerun), the later row counts.
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
    """Format a number: 1,234 or `digits` decimals, small ones with 3 significant digits; "–" for a missing one."""
    if not is_number(value):
        return "–" if value is None or isinstance(value, ChainableUndefined) else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:,.{digits}f}"


def _signed(value: Any) -> str:
    return ("+" if is_number(value) and value > 0 else "") + _num(value)


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}%" if is_number(value) else _num(value)


def _duration(seconds: Any) -> str:
    if not is_number(seconds) or seconds < 60:
        return _num(seconds, 1) + (" s" if is_number(seconds) else "")
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
