"""The rows of the report's tables, worked by hand where two figures or two models may be taken for one another."""

from dataclasses import replace

import pytest

from rlhf.reporting import tables
from rlhf.reporting.run import read_run


@pytest.fixture
def run(tmp_path):
    """A run without any file."""
    return read_run(tmp_path)


def counts(first):
    """A gain's figures, each another one."""
    names = ("gain", "p_value", "win_rate", "wins", "ties", "losses", "detectable", "prompts_needed")
    values = (first, first / 8, first / 2, *(int(8 * first) + i for i in range(3)), first / 4, int(80 * first))
    return dict(zip(names, values, strict=True)) | {"interval": [first - 0.25, first + 0.25]}


def test_each_judge_has_its_own_figures(run):
    checks = {"gold": counts(0.5) | {"in_sd": 0.125}, "proxy_in_sd": 0.75, "agreement": 0.25}
    evaluation = {"confidence": 0.9, "gains": {"full": counts(1.0)}, "validity": {"full": checks}}
    table = tables.gold(replace(run, evaluation=evaluation))
    assert table.rows == [
        [
            *("full, PPO's reward model", "+1.000 [+0.750,\u00a0+1.250]", "+0.750", "0.125", "50.0%"),
            *("8 / 9 / 10", "0.250", "80"),
        ],
        [
            *("full, second reward model", "+0.500 [+0.250,\u00a0+0.750]", "+0.125", "0.062", "25.0%"),
            *("4 / 5 / 6", "0.125", "40"),
        ],
    ]
    assert table.columns[1] == "Gain [90%]"
    assert table.note.endswith("differences: full 0.25.")


def test_the_first_table_has_each_policys_own_figures(run):
    models = {
        name: {"mean_reward": x, "eos_rate": x / 2, "kl_per_token": x / 4} for name, x in (("full", 1.0), ("lora", 0.5))
    }
    gains = {"full": counts(1.0), "lora": counts(0.25)}
    validity = {"full": {"gold": counts(0.5)}, "lora": {"gold": counts(-0.5)}}
    evaluation = {"n_prompts": 7, "models": {"base": None} | models, "gains": gains, "validity": validity}
    table = tables.result(replace(run, evaluation=evaluation))
    assert table.rows == [
        ["base", "–", "–", "–", "–", "–", "–", "–"],
        [
            *("full", "1.000", "+1.000 [+0.750,\u00a0+1.250]", "+0.500 [+0.250,\u00a0+0.750]"),
            *("50.0%", "50.0%", "0.250", "gain, confirmed"),
        ],
        [
            *("LoRA", "0.500", "+0.250 [0.000,\u00a0+0.500]", "-0.500 [-0.750,\u00a0-0.250]"),
            *("12.5%", "25.0%", "0.125", "no gain shown"),
        ],
    ]
    assert tables.result(replace(run, evaluation=evaluation | {"gains": {"full": None}})).rows == []


def test_one_column_of_versions_where_all_stages_ran_the_same(run):
    same = {"git_commit": "abc", "versions": {"torch": "2.13.0"}}
    other = {"git_commit": "abc", "versions": {"torch": "2.14.0"}}
    table = tables.versions(replace(run, stages={"reward": same, "ppo_full": same}))
    assert (table.columns, table.rows) == (
        ["Package", "All stages"],
        [["git commit", "abc"], ["torch", "2.13.0"]],
    )
    table = tables.versions(replace(run, stages={"reward": same, "ppo_full": other}))
    assert (table.columns, table.rows[1]) == (
        ["Package", "Reward model", "PPO, full"],
        ["torch", "2.13.0", "2.14.0"],
    )


def test_rules_that_drop_rows_and_their_share_of_the_first_count(run):
    kept = {"rows": 200, "empty": 0, "too long": 50, "split": {"train": 150}}
    stages = {
        "reward": {"data": {"pairs": kept}},
        "reward_gold": {"data": {"pairs": kept | {"too long": 20}}},
        "ppo_full": {"data": {"pairs": kept}},
    }
    table = tables.data(replace(run, stages=stages))
    both, other = "Reward model, PPO, full", "Second reward model"
    assert table.rows[:3] == [
        [both, "pairs", "rows", "200", "100.0%"],
        [both, "pairs", "too long", "50", "25.0%"],
        [both, "pairs", "split.train", "150", "75.0%"],
    ]
    assert [other, "pairs", "too long", "20", "10.0%"] in table.rows
    assert len(table.rows) == 6


def test_what_was_trained_and_what_it_took(run):
    models = [
        {"role": "policy", "name": "a", "parameters": 2000, "trainable": 500},
        {"role": "critic", "name": "b", "parameters": 1000, "trainable": 1000},
        {"role": "reference", "name": "a", "parameters": 2000, "trainable": 0},
    ]
    facts = {"models": models, "seconds": 65, "peak_memory": 3_250_000_000}
    stages = {"ppo_lora": facts, "evaluation": facts}
    found = replace(run, stages=stages, sizes={"ppo_lora": {"x": 1_500_000}}, checkpoints={"ppo_lora": 250_000_000})
    assert [row[1:] for row in tables.models(found).rows[:3]] == [
        ["policy", "a", "2,000", "500", "25.000%"],
        ["critic", "b", "1,000", "1,000", "100.000%"],
        ["reference", "a", "2,000", "0", "0.000%"],
    ]
    assert tables.costs(found).rows == [["PPO, LoRA", "x 1.5 MB", "1 min 05 s", "3.25", "1,500", "250.0"]]
    bare = tables.costs(replace(run, stages={"reward": {"models": models[2:]}})).rows
    assert bare == [["Reward model", "–", "–", "–", "0", "–"]]


def test_ratings_are_each_models_own_at_their_own_level(run):
    def means(x):
        return {name: {"mean": x + i, "interval": [x, x + 2]} for i, name in enumerate(("overall", "relevance"))}

    pair = {"of": "lora", "over": "full", "wins": 5, "ties": 2, "losses": 1, "prompts_needed": 17}
    pair |= {"difference": 0.5, "interval": [0.25, 0.75], "preference": 0.75, "preference_interval": [0.5, 1.0]}
    found = {
        **{"confidence": 0.9, "criteria": {"relevance": "Relevance"}, "raters": ["Ann", "Bob"], "n_prompts": 8},
        **{"models": {"full": means(1.0), "lora": means(2.0)}, "agreement": {"relevance": 0.625}},
        **{"pairs": [pair | {"p_value": 0.03}], "incomplete": ["Cem"]},
    }
    rated = replace(run, ratings=found)
    table = tables.ratings(rated)
    assert table.columns == ["Criterion", "full [90%]", "LoRA [90%]", "Agreement (alpha)"]
    assert table.rows == [
        ["All criteria", "1.00 [1.00,\u00a03.00]", "2.00 [2.00,\u00a04.00]", "–"],
        ["Relevance", "2.00 [1.00,\u00a03.00]", "3.00 [2.00,\u00a04.00]", "0.62"],
    ]
    table = tables.preferences(rated)
    preferred, points = "75.0% [50.0%,\u00a0100.0%]", "+0.500 [+0.250,\u00a0+0.750]"
    assert table.rows == [["LoRA over full", "5 / 2 / 1", preferred, points, "0.030", "17"]]
    assert table.note.endswith("Incomplete sheets, not counted: Cem.")


def test_right_and_wrong_of_each_place(run):
    report = {
        label: dict(zip(("precision", "recall", "f1-score"), values, strict=True))
        for label, values in (("first", (0.75, 0.6, 0.5)), ("second", (0.25, 0.125, 0.4)))
    }
    reward = {"confusion_matrix": [[6, 4], [2, 18]], "classification_report": report}
    assert tables.confusion(replace(run, reward=reward), ["first", "second"]).rows == [
        ["the first is better", "10", "6", "4", "0.750", "0.600", "0.500"],
        ["the second is better", "20", "18", "2", "0.250", "0.125", "0.400"],
    ]


def test_groups_of_a_reward_model_that_was_not_evaluated_as_a_whole(run):
    row = {"n": 5, "accuracy": 0.5, "interval": [0.25, 0.75]}
    audit = {"groups": {"subset": {"a": row, "b": row}}, "baselines": {"longer": row}}
    found = tables.reward_groups(replace(run, reward={"audit": audit}))
    assert [name for name, _ in found] == ["subset: a", "subset: b", "rule: longer"]
    assert tables.reward_groups(replace(run, reward={"after": {"accuracy": 0.5}})) == []
    leaked = tables.reward_audit(replace(run, reward={"audit": {"leaked": {"opening": 3, "chosen_response": 4}}}))
    assert (
        "opening with a training pair: 3; whose chosen response is among the training responses: 4." in leaked[1].note
    )


def test_counts_that_are_no_counts_are_left_out(run):
    stages = {"reward": {"data": {"pairs": 7, "more": {"rows": 0, "kept": 3}}}}
    assert tables.data(replace(run, stages=stages)).rows == [["Reward model", "more", "kept", "3", "–"]]


def test_the_last_row_of_each_policy_and_the_first_six(run):
    def row(step, **more):
        return {"step": step, "objective/kl": step / 2} | more

    ppo = {"full": [row(i) for i in range(9)], "lora": [row(3), row(4, **{"time/rollout": 1.5, "time/update": 2.5})]}
    found = replace(run, ppo=ppo)
    table = tables.ppo_last(found)
    rows = {line[0]: line[2:] for line in table.rows}
    assert rows["step"] == ["8", "4"]
    assert rows["objective/kl"] == ["4.000", "2.000"]
    assert rows["time/update"] == ["–", "2.500"]
    assert table.columns[2:] == ["full", "LoRA"]
    assert [line[0] for line in tables.ppo_first(found, "full").rows] == list("012345")
    assert tables.ppo_first(found, "lora").caption == "First PPO steps, LoRA"


def test_the_state_of_every_stage(run):
    done = {"status": "done", "started": "2031-05-01T10:00:00+00:00", "seconds": 65, "world_size": 2, "device": "cuda"}
    stages = {"reward": done | {"seed": 0, "command": "/a/b/python x"}, "ppo_full": {"status": "running"}}
    table = tables.stages(replace(run, stages=stages))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["Reward model"] == ["done", "2031-05-01 10:00:00 UTC", "1 min 05 s", "0", "2 × cuda"]
    assert rows["PPO, full"] == ["running", "–", "–", "–", "– × –"]
    assert rows["Evaluation"] == ["not run", *["–"] * 4]
    assert tables.commands(replace(run, stages=stages)).rows == [["Reward model", "…/python x"]]
    assert tables.stages(run).rows == []


def test_settings_stand_beside_one_another_and_only_changed_ones_in_the_first_table(run):
    stages = {
        "reward": {"config": {"lr": 1, "lora": {"r": 2}, "names": ["a", "/x/y/b"]}, "changed": ["lora"]},
        "ppo_full": {"config": {"lr": 3, "kl": None}, "changed": ["lr"]},
    }
    found = replace(run, stages=stages)
    assert tables.settings(found, True).rows == [["lr", "1", "3"], ["lora.r", "2", ""]]
    assert tables.settings(found, False).rows == [
        ["lr", "1", "3"],
        ["lora.r", "2", ""],
        ["names", "a, …/b", ""],
        ["kl", "", "None"],
    ]
