"""train_reward.py shows progress while it tokenises, and splits the pairs as a single pass would."""

import pytest
import tiny

from rlhf.cli import train_reward
from rlhf.config import PreferenceConfig, RewardStageConfig
from rlhf.data.chat import prepare_tokenizer
from rlhf.data.hh_rlhf import load_pairs, split_pairs
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


def test_the_line_of_kept_pairs_names_other_layouts():
    counts = {"rows": 9, "empty_response": 1, "kept": 8, "too_long": 1, "identical_tokens": 1, "layout_hh_text": 9}
    assert train_reward.kept_line(counts) == "6 pairs kept of 9 (1 empty response, 1 too long, 1 identical tokens)"
    counts |= {"layout_hh_text": 4, "layout_sharegpt": 5}
    assert train_reward.kept_line(counts).endswith("tokens); layouts: 4 hh_text, 5 sharegpt")
