"""The tables of the report: from a run's files to rows of text. A part that was not run has no rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.reporting.conclusions import verdict
from rlhf.reporting.formats import duration, flat, num, percent, short, signed, with_ends
from rlhf.reporting.run import Run
from rlhf.reporting.values import NAMES, is_number
from rlhf.storage.stages import TITLES

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
LAST_ROW = {
    "objective/scores": "Score of the reward model, mean per response",
    "objective/penalised_scores": "What PPO learns from: score, scaled and clipped, less missing_eos_penalty",
    "objective/non_score_reward": "KL penalty as a reward, mean per response",
    "objective/rlhf_reward": "Penalised score plus KL penalty, mean per response",
    "objective/kl": "KL to the reference model, nats per response",
    "objective/kl_per_token": "KL to the reference model, nats per response token",
    "objective/kl_coef": "Coefficient of the KL penalty",
    "objective/entropy": "Entropy of the policy, nats per response",
    "objective/response_length": "Response length, tokens",
    "objective/eos_rate": "Responses ended with EOS, share",
    "policy/approxkl_avg": "Approximate KL to the sampling policy, nats",
    "policy/clipfrac_avg": "Tokens with a clipped ratio, share",
    "loss/policy_avg": "Clipped policy loss",
    "loss/value_avg": "Clipped value loss",
    "val/ratio": "Probability ratio, updated to sampling policy",
    "lr": "Learning rate",
    "eps": "Episodes per second",
}


@dataclass(frozen=True)
class Table:
    """A table in words; without rows it is not shown."""

    caption: str
    columns: Sequence[str]
    rows: list[list[str]]
    texts: int = 1  # columns after so many hold numbers
    note: str = ""  # what a reader must know, under the table
    code: frozenset[int] = frozenset()  # columns that are set as code
    words: frozenset[int] = frozenset()  # columns of text after the first `texts`


def name_of(model: str) -> str:
    """A model's name for readers."""
    return NAMES.get(model, model)


def result(run: Run) -> Table:
    """Before and after, for all policies under both reward models: the first table of the report."""
    level = level_of(run)
    found = verdict(run.evaluation)
    rows = []
    for name, model in run.evaluation.get("models", {}).items():
        record: Mapping[str, Any] = model or {}
        gain = _part(run.evaluation, "gains", name)
        gold = _part(run.evaluation, "validity", name, "gold")
        rows.append(
            [
                name_of(name),
                num(record.get("mean_reward")),
                with_ends(gain.get("gain"), gain.get("interval"), signed),
                with_ends(gold.get("gain"), gold.get("interval"), signed),
                percent(gain.get("win_rate")),
                percent(record.get("eos_rate")),
                num(record.get("kl_per_token")),
                found.words.get(name, "–") if found else "–",
            ]
        )
    n = num(run.evaluation.get("n_prompts"))
    columns = ["Policy", "Reward", f"Gain [{level}]", f"Gain by the second reward model [{level}]"]
    return Table(
        f"Before and after PPO, on {n} prompts that no policy was trained on",
        [*columns, "Wins", "Ended", "KL per token", "Verdict"],
        rows if any(run.evaluation.get("gains", {}).values()) else [],
        words=frozenset({7}),
        note="Reward: mean score of the reward model that PPO used. Gain: over the base model on the same "
        "prompts. Second reward "
        "model: trained on other pairs with another seed, and not seen by PPO. Wins: share of prompts on "
        "which the policy scores higher "
        "than the base model. Ended: responses that end by themselves, not at the length limit. KL: to the "
        "base model, in nats.",
    )


def level_of(run: Run) -> str:
    """The confidence level of the evaluation's intervals, as a percentage."""
    return f"{100 * run.evaluation.get('confidence', 0.95):g}%"


def _part(record: Any, *keys: str) -> Mapping[str, Any]:
    """The record under nested keys; {} if there is none."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record if isinstance(record, Mapping) else {}


# Reward model


def reward_pairs(run: Run) -> Table:
    """Both reward models before and after training."""
    rows = []
    for name, model in (("Reward model", run.reward), ("Second reward model", run.gold)):
        for when in ("before", "after"):
            row = _part(model, when)
            if row:
                accuracy = with_ends(row.get("accuracy"), row.get("accuracy_interval"), percent)
                about = [
                    f"{num(model.get('n'))} {num(model.get('split'))}",
                    f"{num(row.get('loss'))} ({num(model.get('loss_type'))})",
                ]
                rows.append([f"{name}, {when} training", *about, accuracy, signed(row.get("mean_margin"))])
    return Table(
        "Reward models on pairs that they were not trained on",
        ["Model", "Pairs", "Loss", "Accuracy [95%]", "Mean margin"],
        rows,
        note="Accuracy: share of pairs in which the chosen response scores higher. Margin: score of the "
        "chosen response minus score of "
        "the rejected one.",
    )


def reward_groups(run: Run) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, accuracy with interval) of all pairs, of groups of them, and of rules that a reward model must beat."""
    after, audit = _part(run.reward, "after"), _part(run.reward, "audit")
    if not audit:
        return []
    found: list[tuple[str, Mapping[str, Any]]] = []
    if after:
        found.append(("all pairs", {"accuracy": after.get("accuracy"), "interval": after.get("accuracy_interval")}))
    for kind, groups in _part(audit, "groups").items():
        for name, row in groups.items():
            if len(groups) > 1:
                found.append((f"{kind}: {name}" if kind != "length" else name, row))
    found += [(f"rule: {name}", row) for name, row in _part(audit, "baselines").items()]
    return found


def reward_audit(run: Run) -> list[Table]:
    """Accuracy by group, and against baselines."""
    audit = _part(run.reward, "audit")
    groups = [
        [str(kind), str(name), num(row.get("n")), with_ends(row.get("accuracy"), row.get("interval"), percent)]
        for kind, found in _part(audit, "groups").items()
        for name, row in found.items()
    ]
    rules = [
        [
            str(name),
            with_ends(row.get("accuracy"), row.get("interval"), percent),
            f"{num(row.get('better'))} / {num(row.get('worse'))}",
            num(row.get("p_value")),
        ]
        for name, row in _part(audit, "baselines").items()
    ]
    leaked = _part(audit, "leaked")
    return [
        Table("Accuracy by group of pairs", ["By", "Group", "Pairs", "Accuracy [95%]"], groups, texts=2),
        Table(
            "Against rules that a reward model must beat",
            ["Rule", "Accuracy [95%]", "Model better / worse", "p-value"],
            rules,
            note="Longer, shorter: the response with more, or fewer, words wins. Bag of words: logistic "
            "regression on tf-idf differences, "
            "fitted on the training pairs. Better / worse: pairs on which only one is right; p-value: sign "
            "test on these pairs. Rank "
            f"correlation (Spearman) of score and number of words: {num(audit.get('length_correlation'), 2)}. "
            "Test pairs that share their "
            f"opening with a training pair: {num(leaked.get('opening'))}; whose chosen response is among the "
            "training responses: "
            f"{num(leaked.get('chosen_response'))}.",
        ),
    ]


def confusion(run: Run, labels: Sequence[str]) -> Table:
    """The confusion matrix and the classification report in one table."""
    matrix, report = run.reward.get("confusion_matrix", []), _part(run.reward, "classification_report")
    rows = []
    for i, (label, counts) in enumerate(zip(labels, matrix, strict=True)):
        row = _part(report, label)
        wrong = sum(counts) - counts[i]
        figures = [num(row.get(key)) for key in ("precision", "recall", "f1-score")]
        rows.append([f"the {label} is better", num(sum(counts)), num(counts[i]), num(wrong), *figures])
    return Table(
        "Right and wrong by the place of the better response",
        ["In the data", "Pairs", "Model agrees", "Model disagrees", "Precision", "Recall", "F1"],
        rows,
        note="The two responses of a pair are shown in random order, first and second: a model that always "
        "prefers one place would "
        "show here. Precision: share of the model's choices of that place that are right. Recall: share of "
        "that row's pairs that it "
        "gets right. F1: their harmonic mean.",
    )


def reward_first(run: Run) -> Table:
    """The first logged rows of reward training."""
    return Table(
        "Reward training, first logged rows",
        list(REWARD_COLUMNS.values()),
        _logged(run.reward_log, REWARD_COLUMNS),
        texts=0,
    )


def _logged(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[list[str]]:
    return [[num(row.get(key)) for key in columns] for row in rows[:N_FIRST]]


# PPO


def troubles(run: Run, stage: str) -> Table:
    """Warnings and skipped updates of a training stage."""
    found = run.troubles.get(stage, [])
    rows = [[num(row["step"]), row["words"], row["helps"] or "–"] for row in found[:N_TROUBLES]]
    more = (
        f"And {len(found) - N_TROUBLES} more, in warnings.jsonl and skipped.jsonl." if len(found) > N_TROUBLES else ""
    )
    caption = f"Warnings and skipped updates, {TITLES[stage]}"
    return Table(caption, ["Step", "What happened", "What usually helps"], rows, texts=3, note=more)


def ppo_first(run: Run, name: str) -> Table:
    """The first steps of a PPO run."""
    caption = f"First PPO steps, {name_of(name)}"
    return Table(caption, list(PPO_COLUMNS.values()), _logged(run.ppo[name], PPO_COLUMNS), texts=0)


def ppo_last(run: Run) -> Table:
    """The last logged row of each PPO run, with the meaning of each number."""
    last = {name: rows[-1] for name, rows in run.ppo.items()}
    times = dict.fromkeys(key for row in last.values() for key in row if key.startswith("time/"))
    named = {"step": "PPO step"} | LAST_ROW | dict.fromkeys(times, "Time of this phase, s")
    rows = [[key, meaning, *(num(row.get(key)) for row in last.values())] for key, meaning in named.items()]
    columns = ["Metric", "Meaning", *map(name_of, last)]
    return Table("Last PPO step", columns, rows if last else [], texts=2, code=frozenset({0}))


# Evaluation


def gold(run: Run) -> Table:
    """The gains under both reward models, in units that can be compared."""
    level, rows = level_of(run), []
    for name in run.evaluation.get("gains", {}):
        checks = _part(run.evaluation, "validity", name)
        for judge, row, spread in (
            ("PPO's reward model", _part(run.evaluation, "gains", name), checks.get("proxy_in_sd")),
            ("second reward model", _part(checks, "gold"), _part(checks, "gold").get("in_sd")),
        ):
            if not row:
                continue
            rows.append(
                [
                    f"{name_of(name)}, {judge}",
                    with_ends(row.get("gain"), row.get("interval"), signed),
                    signed(spread),
                    num(row.get("p_value")),
                    percent(row.get("win_rate")),
                    " / ".join(num(row.get(key)) for key in ("wins", "ties", "losses")),
                    num(row.get("detectable")),
                    num(row.get("prompts_needed")),
                ]
            )
    agreement = [
        f"{name_of(name)} {num(checks.get('agreement'), 2)}"
        for name, checks in run.evaluation.get("validity", {}).items()
        if checks and is_number(checks.get("agreement"))
    ]
    same = (
        f" Rank correlation (Spearman) of both reward models' differences: {', '.join(agreement)}." if agreement else ""
    )
    return Table(
        "Gains under both reward models",
        [
            "Policy and judge",
            f"Gain [{level}]",
            "In SD",
            "p-value",
            "Win rate",
            "Wins / ties / losses",
            "Can show",
            "Prompts needed",
        ],
        rows,
        note="Interval: paired bootstrap over prompts, expanded percentiles. SD: the gain divided by the standard "
        "deviation of that reward model's "
        "scores of the base model's responses. p-value: two-sided sign-flip permutation test. Can show: the "
        "gain that this number of "
        "prompts shows with a power of 80%. Prompts needed: to show a gain of this size." + same,
    )


def equal_length(run: Run) -> Table:
    """The gain that is left at equal length."""
    level, rows = level_of(run), []
    for name in run.evaluation.get("gains", {}):
        line = _part(run.evaluation, "validity", name, "length")
        if line:
            slope = with_ends(line.get("slope"), line.get("slope_interval"), signed)
            rows.append(
                [
                    name_of(name),
                    signed(line.get("mean_difference")),
                    slope,
                    with_ends(line.get("gain"), line.get("interval"), signed),
                ]
            )
    return Table(
        "Gain at equal length",
        ["Policy", "Length difference (tokens)", f"Reward per token [{level}]", f"Gain at equal length [{level}]"],
        rows,
        note="Least squares of each prompt's score difference on its length difference. Gain at equal length: "
        "the line's value at a "
        "length difference of 0.",
    )


def responses(run: Run) -> Table:
    """What each model's responses are like."""
    keys = ("distinct_1", "distinct_2", "repetition", "kl", "length_correlation")
    rows = [
        [
            name_of(name),
            with_ends(model.get("mean_reward"), model.get("interval")),
            num(model.get("response_length"), 1),
            *(num(model.get(key)) for key in keys),
        ]
        for name, model in run.evaluation.get("models", {}).items()
        if model
    ]
    return Table(
        "Responses of each model",
        [
            "Model",
            f"Mean reward [{level_of(run)}]",
            "Tokens",
            "Distinct-1",
            "Distinct-2",
            "Repetition",
            "KL",
            "Score–length r",
        ],
        rows,
        note="One response to each prompt. Distinct-n: distinct word n-grams divided by all n-grams, over all "
        "responses (Li et al. 2016). "
        "Repetition: share of a response's 4-grams that occurred earlier in it (Welleck et al. 2020). KL: to "
        "the base model, in nats per "
        "response, summed over the whole vocabulary at each position. Score–length r: Spearman's rank correlation.",
    )


def by_prompt_length(run: Run) -> Table:
    """Gains in groups of prompts."""
    names = list(run.evaluation.get("gains", {}))
    rows = []
    for group in run.evaluation.get("length_groups", []):
        found = [_part(group, "gains", name) for name in names]
        gains = [with_ends(row.get("gain"), row.get("interval"), signed) for row in found]
        rows.append([f"{num(group.get('from'))} to {num(group.get('to'))} tokens", num(group.get("n")), *gains])
    columns = ["Prompt length", "Prompts", *(f"{name_of(name)} [{level_of(run)}]" for name in names)]
    return Table("Gain by length of the prompt", columns, rows, note="Three groups of about equal size.")


# Ratings


def ratings(run: Run) -> Table:
    """Mean ratings by criterion."""
    found = run.ratings
    models = found.get("models", {})
    level = _rating_level(run)
    rows = [
        [
            title,
            *(
                with_ends(row.get("mean"), row.get("interval"), lambda x: num(x, 2))
                for row in (_part(model, key) for model in models.values())
            ),
            num(found.get("agreement", {}).get(key), 2),
        ]
        for key, title in [("overall", "All criteria"), *found.get("criteria", {}).items()]
    ]
    caption = (
        f"Mean rating, 1 to 5; {num(found.get('n_prompts'))} prompts, raters: {', '.join(found.get('raters', []))}"
    )
    columns = ["Criterion", *(f"{name_of(name)} [{level}]" for name in models), "Agreement (alpha)"]
    return Table(caption, columns, rows if models else [])


def preferences(run: Run) -> Table:
    """Preference between models, pair by pair."""
    level = _rating_level(run)
    rows = [
        [
            f"{name_of(pair['of'])} over {name_of(pair['over'])}",
            " / ".join(num(pair.get(key)) for key in ("wins", "ties", "losses")),
            with_ends(pair.get("preference"), pair.get("preference_interval"), percent),
            with_ends(pair.get("difference"), pair.get("interval"), signed),
            num(pair.get("p_value")),
            num(pair.get("prompts_needed")),
        ]
        for pair in run.ratings.get("pairs", [])
    ]
    left_out = run.ratings.get("incomplete", [])
    return Table(
        "Preference between models",
        [
            "Pair",
            "Wins / ties / losses",
            f"Preference [{level}]",
            f"Difference in points [{level}]",
            "p-value",
            "Prompts needed",
        ],
        rows,
        note="Raters saw the responses in random order, without the models' names. A prompt's value is the "
        "mean over raters; intervals "
        "resample prompts. Alpha: Krippendorff's alpha for ordinal ratings. Preference: share of (rater, "
        "prompt) in which the mean over "
        "criteria is higher; a tie counts half. Prompts needed: to detect a difference of 0.3 points with a "
        "power of 80%." + (f" Incomplete sheets, not counted: {', '.join(left_out)}." if left_out else ""),
    )


def _rating_level(run: Run) -> str:
    return f"{100 * run.ratings.get('confidence', 0.95):g}%"


# Appendix


def stages(run: Run) -> Table:
    """Every stage: its state, time, seed and command."""
    rows = []
    for stage, title in TITLES.items():
        info: Mapping[str, Any] = run.stages.get(stage, {})
        if stage not in run.stages:
            rows.append([title, "not run", *["–"] * 4])
            continue
        started = num(info.get("started")).replace("T", " ").replace("+00:00", " UTC")
        seed = "–" if info.get("seed") is None else str(info["seed"])
        where = f"{num(info.get('world_size'))} × {num(info.get('device'))}"
        rows.append([title, num(info.get("status")), started, duration(info.get("seconds")), seed, where])
    columns = ["Stage", "Status", "Started", "Time", "Seed", "Processes"]
    return Table("Stages", columns, rows if run.stages else [], texts=6, note="Time: from start to end of the stage.")


def commands(run: Run) -> Table:
    """The command of each stage, without the folders of this machine."""
    rows = [[TITLES[stage], short(info["command"])] for stage, info in run.stages.items() if info.get("command")]
    return Table("Commands", ["Stage", "Command"], rows, texts=2, code=frozenset({1}))


def data(run: Run) -> Table:
    """Rows kept, and rows dropped by each rule; stages with the same counts share a line."""
    shared: dict[tuple[str, tuple[tuple[str, Any], ...]], list[str]] = {}
    for stage, info in run.stages.items():
        for source, counts in info.get("data", {}).items():
            if isinstance(counts, Mapping):
                shared.setdefault((str(source), tuple(flat(counts))), []).append(TITLES[stage])
    rows = []
    for (source, leaves), titles in shared.items():
        total = leaves[0][1] if leaves else None
        for key, count in leaves:
            if count == 0:
                continue
            share = percent(count / total) if is_number(count) and is_number(total) and total else "–"
            rows.append([", ".join(titles), source, key, num(count), share])
    return Table(
        "Data: rows kept, and rows dropped by each rule",
        ["Stages", "Data set", "Rule", "Rows", "Share"],
        rows,
        texts=3,
        note="Each row is counted once, under the first rule that drops it; rules that drop nothing are left "
        "out. Share: of the first count.",
    )


def models(run: Run) -> Table:
    """The models of each stage and their parameters."""
    rows = []
    for stage, info in run.stages.items():
        for model in info.get("models", []):
            total, trained = model.get("parameters"), model.get("trainable")
            share = f"{num(100 * trained / total)}%" if is_number(trained) and total else "–"
            rows.append(
                [TITLES[stage], num(model.get("role")), short(num(model.get("name"))), num(total), num(trained), share]
            )
    columns = ["Stage", "Role", "Name", "Parameters", "Trained", "Share"]
    return Table("Models and parameters", columns, rows, texts=3, note="Trained: parameters that the stage changes.")


def costs(run: Run) -> Table:
    """What full fine-tuning and LoRA cost."""
    rows = []
    for stage, info in run.stages.items():
        if stage not in ("reward", "ppo_full", "ppo_lora"):
            continue
        weights = "; ".join(f"{file} {num(size / 1e6, 1)} MB" for file, size in run.sizes.get(stage, {}).items())
        memory = info.get("peak_memory")
        trained = sum(model["trainable"] for model in info.get("models", []) if is_number(model.get("trainable")))
        kept = run.checkpoints.get(stage)
        rows.append(
            [
                TITLES[stage],
                weights or "–",
                duration(info.get("seconds")),
                num(memory / 1e9, 2) if is_number(memory) else "–",
                num(trained),
                num(kept / 1e6, 1) if kept is not None else "–",
            ]
        )
    return Table(
        "What full fine-tuning and LoRA cost",
        ["Stage", "Weights on disk", "Time", "Peak memory (GB)", "Trained parameters", "Checkpoint (MB)"],
        rows,
        texts=2,
        note="Peak memory of rank 0: allocated on the GPU, or resident in main memory without a GPU. "
        "Checkpoint: the newest one that was "
        "kept, with the optimizer's state; – if none was kept. A LoRA run writes its adapter and a full model "
        "with the adapter merged in.",
    )


def settings(run: Run, changed: bool) -> Table:
    """Settings of all stages side by side: those that differ from their defaults, or all of them.

    Runs that do not say which settings differ have no row in the first kind.
    """
    columns = {stage: dict(flat(info.get("config", {}))) for stage, info in run.stages.items() if info.get("config")}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    if changed:
        differing = {name for info in run.stages.values() for name in info.get("changed", [])}
        names = dict.fromkeys(name for name in names if name.partition(".")[0] in differing)
    rows = [
        [name, *(_setting(column[name]) if name in column else "" for column in columns.values())] for name in names
    ]
    kind = "Settings that differ from their defaults" if changed else "All settings"
    places = frozenset(range(len(columns) + 1))
    return Table(kind, ["Field", *(TITLES[stage] for stage in columns)], rows, texts=99, code=places)


def _setting(value: Any) -> str:
    return short(", ".join(map(str, value)) if isinstance(value, list) else value)


def versions(run: Run) -> Table:
    """Package versions: one column if all stages ran the same."""
    columns: dict[str, dict[str, Any]] = {}
    for stage, info in run.stages.items():
        columns[TITLES[stage]] = {"git commit": info.get("git_commit"), **info.get("versions", {})}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    if len({tuple(column.items()) for column in columns.values()}) == 1:
        columns = {"All stages": next(iter(columns.values()))}
    rows = [[name, *(num(column.get(name)) for column in columns.values())] for name in names]
    return Table("Versions", ["Package", *columns], rows, texts=99, note="As recorded by each stage when it started.")
