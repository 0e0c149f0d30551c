"""A run folder as the report reads it: every file is checked, missing files are empty."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict, cast

from rlhf.errors import UserError, printable
from rlhf.file_types import SKIPPED, WARNINGS, Evaluation, MetricsRow, Ratings, ResponseRow, RewardEvaluation, RunFile
from rlhf.reporting.values import is_number
from rlhf.storage.stages import POLICIES, STAGES, meant_run

Record = dict[str, Any]  # of a file as it was read

_RUN_KINDS = {"data": dict, "config": dict, "versions": dict, "models": list}
_REWARD_KINDS = {
    **dict.fromkeys(("before", "after", "classification_report", "calibration", "best", "audit"), dict),
    **dict.fromkeys(("confusion_matrix", "labels"), list),
}
_RATING_KINDS = {"models": dict, "criteria": dict, "pairs": list, "agreement": dict, "consistency": dict, "words": list}
_KIND_NAMES: dict[type, str] = {dict: "an object", list: "a list"}


class Trouble(TypedDict):
    """A warning or a skipped update, in the report's words."""

    step: int | None
    words: str
    helps: str | None


@dataclass(frozen=True)
class Run:
    """The content of a run folder; {} or [] for a missing file."""

    path: Path
    stages: dict[str, RunFile]  # run.json of each stage whose folder is there
    reward_log: list[MetricsRow]  # reward/metrics.jsonl
    reward: RewardEvaluation  # reward/evaluation.json
    gold: RewardEvaluation  # reward_gold/evaluation.json
    ppo: dict[str, list[MetricsRow]]  # "full", "lora" -> metrics.jsonl, where it has rows
    troubles: dict[str, list[Trouble]]  # training stage -> warnings and skipped updates: step, words, helps
    evaluation: Evaluation  # evaluation/evaluation.json
    responses: list[ResponseRow]  # evaluation/responses.jsonl
    rating_responses: list[ResponseRow]  # evaluation/rating_responses.jsonl
    ratings: Ratings  # ratings/ratings.json
    sizes: dict[str, dict[str, int]]  # stage -> its weight files, checkpoints aside -> bytes
    checkpoints: dict[str, int]  # stage -> bytes of its newest checkpoint, where it keeps one


def read_run(run_dir: Path) -> Run:
    """Read the files of a run folder that the report shows.

    Raises UserError for a missing folder, and for a malformed file, naming the file and the line of a .jsonl.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: expected a run folder, found none{meant_run(run_dir)}")
    folders = {name: run_dir / name for name in STAGES}
    ppo = {name: _read_jsonl(folders[stage] / "metrics.jsonl") for name, stage in POLICIES.items()}
    return Run(
        path=run_dir,
        stages={name: _read_stage(path) for name, path in folders.items() if path.is_dir()},
        reward_log=_read_jsonl(folders["reward"] / "metrics.jsonl"),
        reward=_read_reward(folders["reward"] / "evaluation.json"),
        gold=_read_reward(folders["reward_gold"] / "evaluation.json"),
        ppo={name: rows for name, rows in ppo.items() if rows},
        troubles={name: _read_troubles(path) for name, path in folders.items() if (path / "metrics.jsonl").is_file()},
        evaluation=_read_evaluation(folders["evaluation"] / "evaluation.json"),
        responses=_read_jsonl(folders["evaluation"] / "responses.jsonl"),
        rating_responses=_read_jsonl(folders["evaluation"] / "rating_responses.jsonl"),
        ratings=cast(Ratings, _read_json(run_dir / "ratings" / "ratings.json", _RATING_KINDS)),
        sizes={name: _weights(path) for name, path in folders.items()},
        checkpoints={name: size for name, path in folders.items() if (size := _checkpoint(path))},
    )


def printable_run(run: Run) -> Run:
    """The run with all texts made printable, for places that do not escape them; see `printable`."""
    parts = [field.name for field in fields(run) if field.name != "path"]
    return replace(run, **{name: _printable(getattr(run, name)) for name in parts})


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value, keep="\n\t")
    if isinstance(value, list):
        return [_printable(part) for part in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(part) for name, part in value.items()}
    return value


def _weights(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*.safetensors") if "checkpoint" not in str(path.relative_to(folder)))
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _checkpoint(folder: Path) -> int:
    """Bytes of the newest checkpoint: PPO keeps them as checkpoints/step-N, a transformers Trainer as checkpoint-N."""
    found = [*folder.glob("checkpoints/step-*"), *folder.glob("checkpoint-*")]
    newest = max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) if newest else 0


def labels(reward: RewardEvaluation) -> list[str]:
    """Names of the confusion matrix's rows and columns."""
    size = len(reward.get("confusion_matrix", []))
    return [printable(str(label)) for label in reward.get("labels") or range(size)]


def _read_stage(folder: Path) -> RunFile:
    return cast(RunFile, _read_json(folder / "run.json", _RUN_KINDS))


def _read_reward(path: Path) -> RewardEvaluation:
    reward = cast(RewardEvaluation, _read_json(path, _REWARD_KINDS))
    matrix, size = reward.get("confusion_matrix", []), len(labels(reward))
    rows = [row for row in matrix if isinstance(row, list) and all(map(is_number, row))]
    if matrix and [len(row) for row in rows] != [size] * size:
        raise UserError(f"{path}: expected confusion_matrix as {size} rows of {size} counts, found {matrix}")
    bins = reward.get("calibration", {}).get("bins") or []
    if not isinstance(bins, list) or not all(isinstance(row, dict) for row in bins):
        raise UserError(f"{path}: expected calibration.bins as a list of objects, found {bins}")
    return reward


def _read_evaluation(path: Path) -> Evaluation:
    evaluation = _read_json(path, {"models": dict, "gains": dict, "validity": dict})
    for part in ("models", "gains"):
        for name, record in evaluation.get(part, {}).items():
            if not isinstance(record, dict | None):
                raise UserError(f"{path}: expected {part}.{name} as an object, found {record!r}")
            ends = (record or {}).get("interval") or [0, 0]
            if not (isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends))):
                raise UserError(f"{path}: expected {part}.{name}.interval as [low, high], found {ends}")
    return cast(Evaluation, evaluation)


def _read_troubles(folder: Path) -> list[Trouble]:
    """The rows of warnings.jsonl and skipped.jsonl in words, in the order of their steps."""
    troubles: list[Trouble] = []
    for row in _read_jsonl(folder / WARNINGS):
        words = f"{row.get('seen')}, since step {row.get('since')}"
        troubles.append({"step": row.get("step"), "words": words, "helps": row.get("helps")})
    for row in _read_jsonl(folder / SKIPPED):
        words = f"update skipped: {' and '.join(map(str, _list(row, 'not_finite')))} not finite, "
        words += f"with {len(_list(row, 'rows'))} {'pairs' if folder.name.startswith('reward') else 'responses'}"
        troubles.append({"step": row.get("step"), "words": words, "helps": None})
    return sorted(troubles, key=lambda row: row["step"] if is_number(row["step"]) else -1)


def _list(row: Record, name: str) -> list[Any]:
    found = row.get(name)
    return found if isinstance(found, list) else []


def _read_json(path: Path, kinds: Mapping[str, type]) -> Record:
    """Read an object, {} if there is no file; a UserError for a key that is not of its kind in kinds."""
    if not path.is_file():
        return {}
    record = _parse(path.read_bytes(), str(path))
    for key, kind in kinds.items():
        if key in record and not isinstance(record[key], kind):
            raise UserError(f"{path}: expected {key} as {_KIND_NAMES[kind]}, found {record[key]!r}")
    return record


def _read_jsonl(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")  # not splitlines, which would also split at a lone carriage return
    return [_parse(line, f"{path}:{i}") for i, line in enumerate(lines, start=1) if line.strip()]


def _parse(text: bytes, where: str) -> Record:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected JSON, found {text[:60]!r} ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {text[:60]!r}")
    return {key: value for key, value in record.items() if value is not None}
