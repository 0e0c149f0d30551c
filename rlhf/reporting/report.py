"""The report: one self-contained HTML page and its plots, from the files of a run folder alone.

`read_run` reads and checks, `draw` plots, `render` makes the page; `build_report` puts them on disk. The
words are in report.html.j2. What a stage has not written is said to be missing, never guessed.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from matplotlib.figure import Figure

from rlhf.errors import UserError
from rlhf.reporting import kl, plots
from rlhf.runtime.run_folder import write_bytes

Record = dict[str, Any]

STAGES = {
    "reward": "Reward model",
    "ppo_full": "PPO, full",
    "ppo_lora": "PPO, LoRA",
    "evaluation": "Evaluation",
}
N_SAMPLES = 8  # prompts whose responses are shown side by side

_RUN_KINDS = {"data": dict, "config": dict, "versions": dict, "models": list}
_REWARD_KINDS = {
    **dict.fromkeys(("before", "after", "classification_report", "calibration", "best", "audit"), dict),
    **dict.fromkeys(("confusion_matrix", "labels"), list),
}
_RATING_KINDS = {"models": dict, "criteria": dict, "pairs": list, "agreement": dict, "consistency": dict, "words": list}
_KIND_NAMES: dict[type, str] = {dict: "an object", list: "a list"}


@dataclass(frozen=True)
class Run:
    """A run folder as read: {} or [] stands for a file that is not there."""

    path: Path
    stages: dict[str, Record]  # run.json of each stage whose folder is there
    reward_log: list[Record]  # reward/metrics.jsonl
    reward: Record  # reward/evaluation.json
    ppo: dict[str, list[Record]]  # "full", "lora" -> metrics.jsonl, where it has rows
    evaluation: Record  # evaluation/evaluation.json
    responses: list[Record]  # evaluation/responses.jsonl
    rating_responses: list[Record]  # evaluation/rating_responses.jsonl
    ratings: Record  # ratings/ratings.json


def build_report(run_dir: Path) -> Path:
    """Write run_dir/report/report.html and one NAME.png a plot; return the page's path.

    Each file appears whole or not at all. Raises UserError for a run folder that is not there and for a file
    in it that cannot be read as what it should be (names the file, and the line of a .jsonl).
    """
    run = read_run(Path(run_dir))
    images = {name: plots.to_png(figure) for name, figure in draw(run).items()}
    page = render(run, images)
    folder = run.path / "report"
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        write_bytes(folder / f"{name}.png", image)
    # Half a surrogate pair is valid in JSON but not in UTF-8: one such character must not cost the page.
    write_bytes(folder / "report.html", page.encode("utf-8", "replace"))
    return folder / "report.html"


def read_run(run_dir: Path) -> Run:
    """Read the files of a run folder that the report shows. Raises UserError as build_report does."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: expected a run folder, found none")
    folders = {name: run_dir / name for name in STAGES}
    ppo = {name: _read_jsonl(folders[f"ppo_{name}"] / "metrics.jsonl") for name in ("full", "lora")}
    return Run(
        path=run_dir,
        stages={n: _read_json(path / "run.json", _RUN_KINDS) for n, path in folders.items() if path.is_dir()},
        reward_log=_read_jsonl(folders["reward"] / "metrics.jsonl"),
        reward=_read_reward(folders["reward"] / "evaluation.json"),
        ppo={name: rows for name, rows in ppo.items() if rows},
        evaluation=_read_evaluation(folders["evaluation"] / "evaluation.json"),
        responses=_read_jsonl(folders["evaluation"] / "responses.jsonl"),
        rating_responses=_read_jsonl(folders["evaluation"] / "rating_responses.jsonl"),
        ratings=_read_json(run_dir / "ratings" / "ratings.json", _RATING_KINDS),
    )


def draw(run: Run) -> dict[str, Figure]:
    """Return the plots for which the run has data, by file name without ending."""
    figures: dict[str, Figure] = {}
    reward, bins = run.reward, run.reward.get("calibration", {}).get("bins")
    if run.reward_log:
        figures["reward_learning"] = plots.learning_curves(run.reward_log, reward.get("best", {}).get("step"))
    if reward.get("confusion_matrix"):
        figures["reward_confusion"] = plots.confusion_matrix(reward["confusion_matrix"], _labels(reward))
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
    return figures


def render(run: Run, images: Mapping[str, bytes]) -> str:
    """Return the page. images: plot name -> PNG bytes, put into the page; one not given is left out."""
    environment = Environment(
        # Every text of a model, a data set or a config is escaped; what was not written shows as a dash.
        autoescape=True,
        undefined=ChainableUndefined,
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"num": _num, "signed": _signed, "percent": _percent, "duration": _duration}
    environment.filters["flat"] = lambda record: list(_flat(record))
    environment.filters["named"] = lambda keys, names: [names.get(key, key) for key in keys]
    return environment.get_template("report.html.j2").render(
        run=run,
        stage_names=STAGES,
        model_names=plots.NAMES,
        labels=_labels(run.reward),
        images={name: base64.b64encode(image).decode() for name, image in images.items()},
        band=plots.KL_BAND,
        kl={name: kl.interpret(rows) for name, rows in run.ppo.items()},
        kl_rules=kl.RULES,
        smooth=plots.SMOOTH,
        samples=choose_samples(run.responses),
        rated=choose_samples(run.rating_responses, count=len(run.rating_responses)),
    )


def choose_samples(responses: Sequence[Record], count: int = N_SAMPLES) -> list[dict[str, Record]]:
    """Return up to count prompts' responses, each as model -> row, evenly spaced in the file's prompt order.

    The choice does not look at scores, so that the page does not show the best ones only. Where a prompt and
    model come twice (a stage that was rerun), the later row counts.
    """
    prompts: dict[str, dict[str, Record]] = {}
    for row in responses:
        prompts.setdefault(str(row.get("prompt_id")), {})[str(row.get("model"))] = row
    groups = list(prompts.values())
    shown = min(count, len(groups))
    return [groups[i * len(groups) // shown] for i in range(shown)]


def _labels(reward: Record) -> list[str]:
    size = len(reward.get("confusion_matrix", []))
    return [str(label) for label in reward.get("labels") or range(size)]


def _read_reward(path: Path) -> Record:
    reward = _read_json(path, _REWARD_KINDS)
    matrix, size = reward.get("confusion_matrix", []), len(_labels(reward))
    rows = [row for row in matrix if isinstance(row, list) and all(map(plots.is_number, row))]
    if matrix and [len(row) for row in rows] != [size] * size:
        raise UserError(f"{path}: expected confusion_matrix as {size} rows of {size} counts, found {matrix}")
    bins = reward.get("calibration", {}).get("bins") or []
    if not isinstance(bins, list) or not all(isinstance(row, dict) for row in bins):
        raise UserError(f"{path}: expected calibration.bins as a list of objects, found {bins}")
    return reward


def _read_evaluation(path: Path) -> Record:
    evaluation = _read_json(path, {"models": dict, "gains": dict})
    for part in ("models", "gains"):
        for name, record in evaluation.get(part, {}).items():
            if not isinstance(record, dict | None):
                raise UserError(f"{path}: expected {part}.{name} as an object, found {record!r}")
            ends = (record or {}).get("interval") or [0, 0]
            if not (isinstance(ends, list) and len(ends) == 2 and all(map(plots.is_number, ends))):
                raise UserError(f"{path}: expected {part}.{name}.interval as [low, high], found {ends}")
    return evaluation


def _read_json(path: Path, kinds: Mapping[str, type]) -> Record:
    """Read an object, {} where there is no file; refuse a key that is there but not of its kind in kinds."""
    if not path.is_file():
        return {}
    record = _parse(path.read_bytes(), str(path))
    for key, kind in kinds.items():
        if key in record and not isinstance(record[key], kind):
            raise UserError(f"{path}: expected {key} as {_KIND_NAMES[kind]}, found {record[key]!r}")
    return record


def _read_jsonl(path: Path) -> list[Record]:
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")  # not splitlines: it would also cut at a lone carriage return
    return [_parse(line, f"{path}:{i}") for i, line in enumerate(lines, start=1) if line.strip()]


def _parse(text: bytes, where: str) -> Record:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: expected JSON, found {text[:60]!r} ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {text[:60]!r}")
    return {key: value for key, value in record.items() if value is not None}


def _flat(record: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield ("outer.inner", value) for each leaf of a nested record, in its order."""
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, (*prefix, str(key)))
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
