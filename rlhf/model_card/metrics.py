"""The figures of a model card: only those in the evaluation.json of a finished stage."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.file_types import RunFile
from rlhf.model_card.markdown import code, table
from rlhf.storage.disk import read_json
from rlhf.storage.stages import read_run, says_done

Record = Mapping[str, Any]

_TEXT_FIGURES = {
    "response_length": ("response length, tokens", ".1f"),
    "eos_rate": ("responses that end with EOS", ".1%"),
    "distinct_2": ("distinct bigrams", ".3f"),
    "repetition": ("repetition", ".3f"),
    "kl": ("KL to the base model, nats per response", ".3f"),
    "kl_per_token": ("KL to the base model, nats per token", ".4f"),
}


def format_number(value: Any, form: str = ".3f") -> str:
    """A finite number in that form; "not measured" for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "not measured"
    return format(value, form)


def reward_metrics(folder: Path, facts: RunFile) -> dict[str, Any]:
    """Template values from a reward model's evaluation on its test pairs; {} if the stage is not done."""
    found = read_json(folder / "evaluation.json") if says_done(facts) else {}
    before, after, audit = (_part(found, name) for name in ("before", "after", "audit"))
    if not after:
        return {}
    accuracy = (
        f"{format_number(after.get('accuracy'), '.1%')} {_interval(after.get('accuracy_interval'), '.1%')}".strip()
    )
    rows = [["accuracy", format_number(before.get("accuracy"), ".1%"), accuracy]]
    for name, label in (("loss", "loss"), ("mean_margin", "mean margin, reward units")):
        rows.append([label, format_number(before.get(name)), format_number(after.get(name))])
    rules = [
        [code(name), f"{format_number(rule.get('accuracy'), '.1%')} {_interval(rule.get('interval'), '.1%')}".strip()]
        for name, rule in _part(audit, "baselines").items()
        if isinstance(rule, dict)
    ]
    correlation = audit.get("length_correlation")
    return {
        "n": format_number(found.get("n"), "d"),
        "metrics": table(["figure", "before training", "after"], rows),
        "baselines": table(["rule", "accuracy"], rules),
        "agreement": accuracy,
        "length_correlation": None if correlation is None else format_number(correlation, "+.2f"),
    }


def policy_metrics(folder: Path, facts: RunFile) -> dict[str, Any]:
    """Template values from the run's evaluation of a PPO model; {} if this model was not evaluated."""
    stage = folder.parent / "evaluation"
    run, name, own = read_run(stage), str(facts.get("stage")).removeprefix("ppo_"), facts.get("id")
    # With another id the evaluation was of an earlier model in this folder.
    evaluated = own is not None and _part(run, "model_ids").get(name) == own
    if not (says_done(run) and says_done(facts) and evaluated):
        return {}
    found = read_json(stage / "evaluation.json")
    models = _part(found, "models")
    base, model, gain = _part(models, "base"), _part(models, name), _part(_part(found, "gains"), name)
    if not model or not gain:
        return {}
    rows = [["mean reward", _with_interval(base, "mean_reward"), _with_interval(model, "mean_reward")]]
    rows += [["gain in reward", "", _with_interval(gain, "gain", "+.3f")], *_more_gains(found, name)]
    counts = ", ".join(f"{format_number(gain.get(key), 'd')} {key}" for key in ("wins", "ties", "losses"))
    rows.append(["win rate over the base model", "", f"{format_number(gain.get('win_rate'), '.1%')} ({counts})"])
    for key, (label, form) in _TEXT_FIGURES.items():
        if key in model:
            own = "" if key.startswith("kl") else format_number(base.get(key), form)
            rows.append([label, own, format_number(model[key], form)])
    config = _part(run, "config")
    judges = [config["reward_model_path"]] if config.get("reward_model_path") else []
    judge = ", ".join([*judges, *(config.get("rewards") or [])]) or f"{folder.absolute().parent.name}/reward"
    return {
        "n": format_number(found.get("n_prompts"), "d"),
        "level": format_number(found.get("confidence"), ".0%").replace("%", " %"),
        "judge": code(judge),
        "metrics": table(["figure", "base model", "this model"], rows),
    }


def _more_gains(found: Record, name: str) -> list[list[str]]:
    validity = _part(_part(found, "validity"), name)
    labels = {
        "length": "gain at equal length",
        "gold": "gain by a second reward model, not used in PPO",
    }
    return [
        [label, "", _with_interval(_part(validity, key), "gain", "+.3f")]
        for key, label in labels.items()
        if _part(validity, key)
    ]


def _part(record: Record, name: str) -> dict[str, Any]:
    part = record.get(name)
    return part if isinstance(part, dict) else {}


def _with_interval(record: Record, name: str, form: str = ".3f") -> str:
    return f"{format_number(record.get(name), form)} {_interval(record.get('interval'), form)}".strip()


def _interval(ends: Any, form: str) -> str:
    if not isinstance(ends, list) or len(ends) != 2:
        return ""
    return f"[{format_number(ends[0], form)}, {format_number(ends[1], form)}]"
