"""Every sum that the report shows comes to what it says, and what it says is what the run measured."""

import json
from dataclasses import replace

import pytest
from test_report import reward_result, write
from tiny_ppo import metrics, trainer

from rlhf.reporting.examples import examples, ppo_examples
from rlhf.reporting.run import read_run

METRICS = {
    "Score, objective/scores": "objective/scores",
    "Penalised score": "objective/penalised_scores",
    "KL penalty": "objective/non_score_reward",
    "Reward of a response": "objective/rlhf_reward",
}


def lengths(completions, **_):
    return [float(len(text)) for text in completions]


def answers(completions, **_):
    return [1.0 + 0.37 * i for i, _ in enumerate(completions)]


def worth(text):
    """The sum as a reader with a pocket calculator has it."""
    return eval(text.replace("×", "*"), {"__builtins__": {}})


def close(example):
    """Whether both sides agree to the last digit that is shown."""
    digits = len(example.right.partition(".")[2])
    return round(worth(example.left), digits) == float(example.right)


def ran(folder, reward=None, **options):
    """A run folder with one policy, really trained for two steps."""
    made = trainer(folder / "ppo_full", reward=reward, max_steps=2, **options)
    made.train()
    write(folder / "ppo_full/run.json", {"status": "done", "config": json.loads(json.dumps(made.args.to_dict()))})
    return read_run(folder)


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"missing_eos_penalty": 1.5}, ["Penalised score", "KL penalty", "Reward of a response"]),
        ({"missing_eos_penalty": 3.0, "score_clip": 0.01}, ["Penalised score", "KL penalty", "Reward of a response"]),
        ({"missing_eos_penalty": 1.0, "score_norm_samples": 4}, ["Penalised score", "KL penalty", "Reward of a"]),
        ({"use_score_scaling": True, "use_score_norm": True}, ["KL penalty", "Reward of a response"]),
        ({"missing_eos_penalty": 1.0, "whiten_rewards": True}, ["Penalised score", "KL penalty", "Reward of a"]),
        ({"kl_coef": 0.5, "kl_estimator": "k3"}, ["KL penalty", "Reward of a response"]),
        ({"reward": [lengths, answers], "reward_weights": [0.5, -2.0]}, ["Score, ", "KL penalty", "Reward of a"]),
        ({"reward": [lengths, answers], "missing_eos_penalty": 1.0}, ["Score, ", "Penalised", "KL penalty", "Rew"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_examples_of_a_run(tmp_path, options, kinds):
    run = ran(tmp_path, **options)
    row = metrics(tmp_path / "ppo_full")[-1]
    found = examples(run)
    assert len(found) == len(kinds)
    for example, kind in zip(found, kinds, strict=True):
        assert example.about.startswith(kind)
        assert close(example), example
        metric = next(metric for start, metric in METRICS.items() if example.about.startswith(start))
        digits = len(example.right.partition(".")[2])
        half = 0.5 * 10.0**-digits + 2.0**-22 * abs(row[metric])  # of the last digit, and what float32 rounds off
        assert abs(float(example.right) - row[metric]) <= half
        assert "(full, step 2)" in example.about
    assert ("scaled and clipped" in found[0].about) == bool({"score_clip", "score_norm_samples"} & options.keys())


def test_a_row_by_hand(tmp_path):
    row = {
        "step": 5,
        "objective/scores": 0.147,
        "objective/eos_rate": 0.0,
        "objective/penalised_scores": -0.853,
        "objective/kl_coef": 0.05,
        "objective/kl": 0.0248,
        "objective/non_score_reward": -0.00124,
        "objective/rlhf_reward": -0.85424,
    }
    run = replace(read_run(tmp_path), stages={"ppo_full": {"config": {"missing_eos_penalty": 1.0}}})
    assert [(example.left, example.right) for example in ppo_examples(run, "full", row)] == [
        ("0.147 - 1 × (1 - 0)", "-0.853"),
        ("-0.0500 × 0.0248", "-0.0012"),
        ("(-0.8530) + (-0.0012)", "-0.8542"),
    ]
    row["objective/rlhf_reward"] = 0.146  # without the penalty: not what these numbers give, so it is not shown
    assert len(list(ppo_examples(run, "full", row))) == 2


def test_gains_and_accuracy(tmp_path):
    write(tmp_path / "reward/evaluation.json", reward_result())
    gains = {"full": {"before": -0.17005, "after": 4.13589, "gain": 4.30594}, "lora": None}
    write(tmp_path / "evaluation/evaluation.json", {"gains": gains})
    rows = [
        {"prompt_id": "p", "model": "base", "score": None},
        {"prompt_id": "p", "model": "full", "score": 2.0},
        {"prompt_id": "q", "model": "base", "score": -0.25},
        {"prompt_id": "q", "model": "lora", "score": 0.5},
    ]
    write(tmp_path / "evaluation/responses.jsonl", rows)
    assert [(e.about.partition(":")[0], e.left, e.right) for e in examples(read_run(tmp_path))] == [
        ("Accuracy of the reward model", "(66 + 65) / 200", "0.655"),
        ("Gain on prompt 2 (LoRA)", "0.500 - (-0.250)", "0.750"),
        ("Gain (full)", "4.136 - (-0.170)", "4.306"),
    ]
    matrix = {"confusion_matrix": [[66, 34], [35, 65]], "after": {"accuracy": 0.7}}  # ties count half: no such sum
    write(tmp_path / "reward/evaluation.json", reward_result() | matrix)
    assert len(examples(read_run(tmp_path))) == 2


def test_float32_rounds_by_the_largest_number_of_a_sum(tmp_path):
    """1234.5678 - 1234.5 is 0.0678, and float32 near 1234 may be off by 0.0003: 0.0687 is told by three digits."""
    row = {"step": 1, "objective/penalised_scores": 1234.5678, "objective/non_score_reward": -1234.5}
    found = ppo_examples(read_run(tmp_path), "full", row | {"objective/rlhf_reward": 0.0687})
    assert [(example.left, example.right) for example in found] == [("1234.568 + (-1234.500)", "0.068")]
    assert list(ppo_examples(read_run(tmp_path), "full", row | {"objective/rlhf_reward": 0.0693})) == []


def test_rewards_without_weights_count_once_each_and_one_needs_no_sum(tmp_path):
    row = {"step": 1, "rewards/a/mean": 0.25, "rewards/b/mean": 0.5, "objective/scores": 0.75}
    run = read_run(tmp_path)
    assert [(e.left, e.right) for e in ppo_examples(run, "full", row)] == [("1 × 0.250 + 1 × 0.500", "0.750")]
    assert list(ppo_examples(run, "full", {"step": 1, "rewards/a/mean": 0.25, "objective/scores": 0.25})) == []


@pytest.mark.parametrize("option", [{"score_clip": 0.0}, {"score_norm_samples": 4}, {"use_score_scaling": True}])
def test_what_is_rescaled_response_by_response_is_worked_back_from_what_was_learned(tmp_path, option):
    row = {"step": 1, "objective/scores": 9.0, "objective/eos_rate": 0.25, "objective/penalised_scores": 0.5}
    run = replace(read_run(tmp_path), stages={"ppo_full": {"config": {"missing_eos_penalty": 1.0} | option}})
    (example,) = ppo_examples(run, "full", row)
    assert (example.left, example.right) == ("1.250 - 1 × (1 - 0.250)", "0.500")
    assert "score, scaled and clipped response by response, less missing_eos_penalty" in example.about
