"""train_reward.py shows progress while it tokenises, and splits the pairs as a single pass would."""

from types import SimpleNamespace

import pytest
import tiny
from trl import ModelConfig

from rlhf.cli import train_reward
from rlhf.config import PreferenceConfig, RewardStageConfig
from rlhf.data.chat import prepare_tokenizer
from rlhf.data.hh_rlhf import load_pairs, split_pairs
from rlhf.errors import UserError
from rlhf.reward.trainer import encode_pairs


@pytest.mark.parametrize("quiet", [False, True])
def test_the_bar_counts_all_pairs_and_the_splits_are_those_of_one_pass(monkeypatch, capsys, quiet):
    monkeypatch.setattr(train_reward, "CHUNK", 7)
    tokenizer = prepare_tokenizer(tiny.gpt2_tokenizer())
    pairs, counts = load_pairs("demo:preferences.jsonl", None, None)
    data = PreferenceConfig(max_examples=8, validation_examples=4, test_examples=4)
    lengths = sorted(max(map(len, row.values())) for row in encode_pairs(tokenizer, pairs, None)[1])
    limit = lengths[len(lengths) * 3 // 4]
    args = RewardStageConfig(
        output_dir="unused", use_cpu=True, bf16=False, max_length=limit, report_to="none", disable_tqdm=quiet
    )
    splits = train_reward.split_fitting(pairs, counts, tokenizer, data, args)
    fitting, _ = encode_pairs(tokenizer, pairs, limit)
    assert splits == split_pairs(fitting, data.split_seed, 8, 4, 4)
    assert counts["too_long"] == sum(length > limit for length in lengths) > 0
    assert ("tokenise pairs: 100%" in capsys.readouterr().err) != quiet
    data.gold = True
    gold = train_reward.split_fitting(pairs, counts, tokenizer, data, args)
    assert gold == split_pairs(fitting, data.split_seed, 8, 4, 4, gold=True)
    assert gold["train"] != splits["train"]


def test_the_line_of_kept_pairs_names_other_layouts():
    counts = {"rows": 9, "empty_response": 1, "kept": 8, "too_long": 1, "identical_tokens": 1, "layout_hh_text": 9}
    assert train_reward.kept_line(counts) == "6 pairs kept of 9 (1 empty response, 1 too long, 1 identical tokens)"
    counts |= {"layout_hh_text": 4, "layout_sharegpt": 5}
    assert train_reward.kept_line(counts).endswith("tokens); layouts: 4 hh_text, 5 sharegpt")


def figures(accuracy, **more):
    return {"loss": 0.5, "accuracy": accuracy, "mean_margin": 0.25} | more


def test_the_test_figures_and_four_pairs_go_to_the_trackers(monkeypatch, tmp_path):
    sent, said = [], []
    monkeypatch.setattr(train_reward, "write_summary", lambda *given: sent.append(given))
    monkeypatch.setattr(train_reward.screen, "ended", said.append)
    pairs = load_pairs("demo:preferences.jsonl", None, None)[0][:6]
    report = {
        "n": 24,
        "before": figures(0.5),
        "after": figures(0.875, accuracy_interval=[0.69, 0.96]),
        "audit": {"baselines": {"shorter response": {"accuracy": 0.625}, "longer response": {"accuracy": 0.375}}},
    }
    train_reward.show_outcome(tmp_path, report, pairs, {"seed": 1})
    ((folder, numbers, samples, config),) = sent
    assert (folder, config) == (tmp_path, {"seed": 1})
    assert numbers == {f"test/{when}/{name}": x for when in ("before", "after") for name, x in figures(0.5).items()} | {
        "test/after/accuracy": 0.875
    }
    assert list(samples) == ["pair/0", "pair/1", "pair/2", "pair/3"]
    for pair, text in zip(pairs, samples.values(), strict=False):
        assert text.endswith(f"\n\nchosen: {pair.chosen}\n\nrejected: {pair.rejected}")
    assert said == ["test, 24 pairs: 50 % → 88 % [69, 96]   always-shorter: 62 %"]


def test_the_report_has_the_figures_of_before_and_after_and_of_both_splits(monkeypatch):
    monkeypatch.setattr(train_reward, "audit", lambda *given: given)
    scores = {"chosen": [1.0], "rejected": [0.5]}
    whole = {name: name for name in ("labels", "confusion_matrix", "classification_report", "calibration")}
    after = figures(0.9, scores=scores, accuracy_interval=[0.8, 1.0], n=7) | whole
    args = SimpleNamespace(loss_type="bradley_terry")
    found = train_reward.outcome(args, figures(0.5, scores={}), after, {"step": 3}, {"train": "a", "test": "b"})
    assert (
        found
        == {
            "split": "test",
            "loss_type": "bradley_terry",
            "before": figures(0.5),
            "after": figures(0.9, accuracy_interval=[0.8, 1.0]),
            "best": {"step": 3},
            "n": 7,
            "audit": ("a", "b", [1.0], [0.5]),
        }
        | whole
    )


@pytest.mark.parametrize(
    ("settings", "trusted", "words"),
    [
        ({"dtype": "bfloat16"}, False, "dtype bfloat16: it counts memory for float32"),
        ({"load_in_4bit": True}, False, "load_in_4bit True: it counts memory for False"),
        ({"load_in_8bit": True}, False, "load_in_8bit True: it counts memory for False"),
        ({}, True, "trust_remote_code True: it counts memory for False"),
    ],
)
def test_what_a_dry_run_cannot_count_is_refused(settings, trusted, words):
    args = SimpleNamespace(trust_remote_code=trusted)
    with pytest.raises(UserError, match=f"^--dry_run does not support {words}$"):
        train_reward.estimate(args, ModelConfig(**settings), "base", {})
