"""Several runs of one recipe with different seeds: each run's value, their mean, and the mean's interval.

A run's own interval is over prompts and holds for that run; the interval here is over runs and holds for the recipe.
Full and LoRA of one run share its reward model and prompts, so they are compared run by run.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from scipy.stats import t

from rlhf.reporting.conclusions import last_quarter
from rlhf.reporting.formats import flat
from rlhf.reporting.run import Run
from rlhf.reporting.values import NAMES, is_number, series
from rlhf.storage.stages import POLICIES, TITLES, says_done

CONFIDENCE = 0.95

# Measures of a model: (name in tables, how to show its values). A gain is over the base model.
MEASURES = {
    "mean_reward": ("Mean reward", "num"),
    "gain": ("Gain in mean reward", "signed"),
    "gold_gain": ("Gain by the second reward model", "signed"),
    "kl_per_token": ("KL at the end (nats per token)", "num"),
    "response_length": ("Response length (tokens)", "num"),
    "eos_rate": ("EOS rate", "percent"),
}
COMPARED = (
    "gain",
    "gold_gain",
    "kl_per_token",
    "response_length",
    "eos_rate",
)  # not mean_reward: its difference equals the gain's

_EQUAL = 1e-12  # relative difference of values that are the same but for rounding

_SEEDED = ("reward", "ppo_full", "ppo_lora")  # stages in which runs must have different seeds
_OWN = {"run", "runs_dir", "output_dir", "logging_dir", "run_name", "seed", "data_seed", "eval_seed"}


@dataclass(frozen=True)
class Summary:
    """One quantity over the runs."""

    name: str
    form: str  # how to show a value: num, signed or percent
    values: list[float | None]  # one per run, in the runs' order; None for a run without it
    mean: float
    interval: tuple[float, float] | None  # of the mean; None with one value, or with equal ones
    p_value: float | None  # two-sided, that the mean is 0; None likewise

    @property
    def n(self) -> int:
        """Runs that have a value."""
        return sum(value is not None for value in self.values)


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's t interval of the mean of N values that are about normal; None for fewer than two."""
    if len(values) < 2:
        return None
    mean, error = _mean_and_error(values)
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def t_p_value(values: Sequence[float]) -> float | None:
    """Two-sided p-value of the t test that the mean of N values is 0; on differences it is the paired t test."""
    if len(values) < 2:
        return None
    mean, error = _mean_and_error(values)
    return float(2 * t.sf(abs(mean) / error, len(values) - 1)) if error > 0 else None


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def summary_of(name: str, form: str, values: Sequence[float | None]) -> Summary | None:
    """Mean, interval and p-value of the values that are not None; None without any. Equal values have no spread."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    mean = math.fsum(there) / len(there)
    if max(there) - min(there) <= _EQUAL * max(map(abs, there)):
        return Summary(name, form, list(values), mean, None, None)
    return Summary(name, form, list(values), mean, t_interval(there), t_p_value(there))


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """Every quantity that at least one run has: the reward model's accuracy, then each measure of each model."""
    accuracies = [_number(run.reward, "after", "accuracy") for run in runs]
    made = [summary_of("Reward model, accuracy", "percent", accuracies)]
    for key, (name, form) in MEASURES.items():
        for model, label in NAMES.items():
            made.append(summary_of(f"{name}, {label}", form, [measure(run, key, model) for run in runs]))
    return [summary for summary in made if summary]


def gains(runs: Sequence[Run]) -> dict[str, Summary]:
    """ "full", "lora" -> the gain in mean reward over the runs, if at least one run has it."""
    name, form = MEASURES["gain"]
    made = {model: summary_of(name, form, [measure(run, "gain", model) for run in runs]) for model in ("full", "lora")}
    return {model: summary for model, summary in made.items() if summary}


def differences(runs: Sequence[Run]) -> list[Summary]:
    """LoRA minus full, run by run, in each compared measure that at least one run has for both."""
    made = []
    for key in COMPARED:
        name, form = MEASURES[key]
        pairs = [(measure(run, key, "full"), measure(run, key, "lora")) for run in runs]
        values = [None if full is None or lora is None else lora - full for full, lora in pairs]
        made.append(summary_of(f"{name} (share)" if form == "percent" else name, "signed", values))
    return [summary for summary in made if summary]


def measure(run: Run, key: str, model: str) -> float | None:
    """A run's value of a measure of MEASURES for "base", "full" or "lora"; None if it has none."""
    if key == "gain":
        return _number(run.evaluation, "gains", model, "gain")
    if key == "gold_gain":
        return _number(run.evaluation, "validity", model, "gold", "gain")
    if key == "kl_per_token":
        _, values = series(run.ppo.get(model, []), "objective/kl_per_token")
        last = last_quarter(values)
        return math.fsum(last) / len(last) if last else None
    return _number(run.evaluation, "models", model, key)


def _number(record: Any, *keys: str) -> float | None:
    """The number under nested keys; None if there is none."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    return float(record) if is_number(record) else None


def done(run: Run, stage: str) -> bool:
    """Whether a stage is finished."""
    return stage in run.stages and says_done(run.stages[stage])


def finished(run: Run) -> Run:
    """The run without the results of unfinished stages: half a curve is not a sample of the recipe."""
    return replace(
        run,
        reward_log=run.reward_log if done(run, "reward") else [],
        reward=run.reward if done(run, "reward") else {},
        ppo={name: rows for name, rows in run.ppo.items() if done(run, POLICIES[name])},
        evaluation=run.evaluation if done(run, "evaluation") else {},
    )


Copies = Mapping[str, Mapping[str, str]]  # run -> its stage -> the earlier run that has the same one


def copies(runs: Sequence[Run]) -> Copies:
    """The stages of each run that an earlier run has, too; runs without any have no entry.

    A stage is a copy if it has the same id in run.json, or the same seed and the same results: counted twice, it would
    make the spread of the runs look smaller than it is.
    """
    found = {}
    for i, run in enumerate(runs):
        originals = {}
        for stage in (stage for stage in TITLES if done(run, stage)):
            same = [other.path.name for other in runs[:i] if _same(run, other, stage)]
            if same:
                originals[stage] = same[0]
        if originals:
            found[run.path.name] = originals
    return found


def without_copies(runs: Sequence[Run], found: Copies) -> list[Run]:
    """The runs, each result once: those of a copied stage are left to the first run that has them."""
    return [_without(run, found[run.path.name]) if run.path.name in found else run for run in runs]


def copy_words(runs: Sequence[Run], found: Copies) -> list[str]:
    """Sentences on what `without_copies` left out."""
    said = []
    for run in runs:
        originals = found.get(run.path.name, {})
        names, stages = dict.fromkeys(originals.values()), [stage for stage in TITLES if done(run, stage)]
        if originals and len(originals) == len(stages) and len(names) == 1:
            said.append(f"{run.path.name} is a copy of {next(iter(names))}: its results are left out")
            continue
        said += [
            f"{TITLES[stage]} of {run.path.name} is a copy of the one of {name}: its results are left out"
            for stage, name in originals.items()
        ]
    return said


def _same(run: Run, other: Run, stage: str) -> bool:
    if not done(other, stage):
        return False
    mine, theirs = run.stages[stage], other.stages[stage]
    if mine.get("id") is not None and mine.get("id") == theirs.get("id"):
        return True
    seed, found = mine.get("seed"), _results(run, stage)
    return seed is not None and seed == theirs.get("seed") and bool(found) and found == _results(other, stage)


def _results(run: Run, stage: str) -> Any:
    """What a stage found, without times, which differ even in a copy that was computed again."""
    if stage == "evaluation":
        return run.evaluation.get("gains")
    if stage == "reward_gold":
        return run.gold.get("after")
    rows = run.reward_log if stage == "reward" else next(run.ppo.get(n, []) for n, s in POLICIES.items() if s == stage)
    timed = ("time/", "perf/", "eps", "eval_runtime", "eval_samples", "eval_steps")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


def _without(run: Run, stages: Container[str]) -> Run:
    """The run without the results of these stages; a policy's go from the evaluation, too."""
    policies = [name for name, stage in POLICIES.items() if stage in stages]
    evaluation: Any = {} if "evaluation" in stages else {**run.evaluation}
    for part in ("gains", "validity", "models"):
        if part in evaluation:
            evaluation[part] = {name: value for name, value in evaluation[part].items() if name not in policies}
    reward = "reward" in stages
    return replace(
        run,
        reward_log=[] if reward else run.reward_log,
        reward={} if reward else run.reward,
        ppo={name: rows for name, rows in run.ppo.items() if name not in policies},
        evaluation=evaluation,
    )


def same_seeds(runs: Sequence[Run], found: Copies | None = None) -> list[str]:
    """Sentences on runs with the same seed in a training stage, which are one sample; copies are left out."""
    said = []
    for stage in _SEEDED:
        distinct = [run for run in runs if done(run, stage) and stage not in (found or {}).get(run.path.name, {})]
        names = _by_value(runs, {run.path.name: run.stages[stage].get("seed") for run in distinct})
        said += [
            f"{TITLES[stage]}: {_join(group)} have the same seed, {seed}: they count as one sample, not {len(group)}"
            for seed, group in names.items()
            if len(group) > 1 and seed != "None"
        ]
    return said


def setting_differences(runs: Sequence[Run]) -> list[str]:
    """Sentences on the settings that differ between runs, except for seeds and the run's own folder."""
    said = []
    for stage, title in TITLES.items():
        settings = {run.path.name: _settings(run, stage) for run in runs if done(run, stage)}
        for key in dict.fromkeys(key for record in settings.values() for key in record):
            groups = _by_value(runs, {name: record.get(key, "not set") for name, record in settings.items()})
            if len(groups) > 1:
                values = "; ".join(f"{value} in {_join(names)}" for value, names in groups.items())
                said.append(f"{title}, {key}: {values}")
    return said


def _settings(run: Run, stage: str) -> dict[str, str]:
    """ "outer.inner" -> value as text; a path into the run's own folder begins with RUN."""
    leaves = flat(run.stages[stage].get("config", {}))
    return {key: _own_path(str(value), run.path.name) for key, value in leaves if key not in _OWN}


def _own_path(value: str, name: str) -> str:
    parts = PurePath(value).parts
    return "/".join(("RUN", *parts[parts.index(name) + 1 :])) if name in parts else value


def _by_value(runs: Sequence[Run], values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Value as text -> names of the runs that have it, in the runs' order."""
    groups: dict[str, list[str]] = {}
    for name in (run.path.name for run in runs):
        if name in values:
            groups.setdefault(str(values[name]), []).append(name)
    return groups


def _join(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
