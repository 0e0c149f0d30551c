"""The work that both sides do is the work it is said to be."""

import statistics
import sys
from dataclasses import replace

import pytest
import torch

from rlhf.benchmark import work
from rlhf.benchmark.compare import check_equal, compare, spread, table
from rlhf.benchmark.growth import exponent, growth_table
from rlhf.benchmark.ppo import Feed, rlhf
from rlhf.cli import benchmark
from rlhf.errors import UserError

TINY = work.SHAPES["tiny"]


def test_prompts_are_as_long_as_those_of_oasst():
    lengths = work.prompt_lengths(20_000, seed=0)
    assert statistics.median(lengths) == pytest.approx(18, abs=1)
    assert sorted(lengths)[19_000] == pytest.approx(67, abs=6)  # 95 %
    assert max(lengths) == work.MAX_PROMPT
    assert min(lengths) >= 1


def test_both_sides_get_the_same_prompts_and_models():
    tokenizer = work.tokenizer_of(TINY)
    assert work.prompts_of(TINY, tokenizer, 3) == work.prompts_of(TINY, tokenizer, 3)
    assert work.prompts_of(TINY, tokenizer, 3) != work.prompts_of(TINY, tokenizer, 4)
    one, two = (work.models_of(TINY, tokenizer, 3)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_prompts_have_their_template_and_at_most_so_many_tokens():
    tokenizer = work.tokenizer_of(TINY)
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (512, 510, 511)
    for prompt, length in ((5, 9), (0, None), (300, work.MAX_PROMPT)):
        found = work.prompts_of(replace(TINY, prompt=prompt), tokenizer, 3)
        lengths = [min(n + 4, work.MAX_PROMPT) for n in work.prompt_lengths(8, 3)] if length is None else [length] * 8
        assert [len(row) for row in found] == lengths
        for row in found:
            assert row[:2] == [1, 2]
            assert len(row) == work.MAX_PROMPT or row[-2:] == [3, 4]
            assert max(row) < 510
    same = [work.prompts_of(replace(TINY, prompt=5), tokenizer, seed) for seed in (0, 1)]
    assert same[0] != same[1]
    assert min(work.prompt_lengths(2000, 1)) >= 1


def test_a_pair_is_one_prompt_with_two_responses_that_end():
    tokenizer = work.tokenizer_of(TINY)
    lengths, rows = work.prompt_lengths(50, 3), work.pairs_of(TINY, tokenizer, 3, 50)
    assert rows == work.pairs_of(TINY, tokenizer, 3, 50)
    assert rows[0]["chosen_ids"][0] != work.pairs_of(TINY, tokenizer, 4, 50)[0]["chosen_ids"][0]
    answers = []
    for n, row in zip(lengths, rows, strict=True):
        chosen, rejected = row["chosen_ids"], row["rejected_ids"]
        assert chosen[:n] == rejected[:n]
        assert chosen.count(510) == rejected.count(510) == 1
        assert chosen[-1] == rejected[-1] == 510
        answers += [(len(chosen) - n - 1, len(rejected) - n - 1)]
    assert min(map(min, answers)) >= 1
    assert max(map(max, answers)) <= 15
    assert sum(one != other for one, other in answers) > 30


def test_models_are_of_the_shape_and_the_seed():
    tokenizer = work.tokenizer_of(TINY)
    policy, reward = work.models_of(replace(TINY, positions=77, layers=1), tokenizer, 3)
    assert policy.transformer.wpe.weight.shape == (77, 32)
    assert (len(policy.transformer.h), policy.config.n_head, policy.config.vocab_size) == (1, 2, 512)
    assert reward.score.out_features == reward.config.num_labels == 1
    other, _ = work.models_of(replace(TINY, positions=77, layers=1), tokenizer, 4)
    assert not torch.equal(policy.transformer.wpe.weight, other.transformer.wpe.weight)


@torch.no_grad()
@pytest.mark.parametrize("mean", [3, work.ENDLESS])
def test_a_short_mean_is_met_and_without_one_nothing_ends(mean):
    policy, _ = work.models_of(replace(TINY, mean_response=mean), work.tokenizer_of(TINY), 0)
    ids = torch.randint(0, 500, (4, 32), generator=torch.Generator().manual_seed(0))
    p = policy.eval()(ids).logits.softmax(-1)[..., 510]
    assert p.mean().item() == pytest.approx(1 / mean, rel=0.05)


@pytest.mark.parametrize(
    ("precision", "on_cpu", "there", "expected"),
    [
        ("default", False, True, {"use_cpu": False}),
        ("bf16", False, False, {"use_cpu": True, "bf16": True}),
        ("fp32", True, True, {"use_cpu": True, "bf16": False}),
    ],
)
def test_settings_of_both_sides_by_hand(monkeypatch, precision, on_cpu, there, expected):
    monkeypatch.setattr(work.torch.accelerator, "is_available", lambda: there)
    shape = work.Shape("own", batch=12, micro=3, response=20, n_ppo_epochs=5, mean_response=7)
    run = work.Run(shape, steps=6, seed=9, precision=precision, on_cpu=on_cpu)
    assert work.precision(run) == expected
    assert work.settings(run, "here") == expected | {
        "output_dir": "here",
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 4,
        "local_rollout_forward_batch_size": 3,
        "num_ppo_epochs": 5,
        "num_mini_batches": 1,
        "total_episodes": 72,
        "response_length": 20,
        "stop_token": "eos",
        "temperature": 1.0,
        "learning_rate": 1e-5,
        "kl_coef": 0.05,
        "num_sample_generations": 0,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 9,
    }


@torch.no_grad()
def test_a_response_ends_at_each_token_with_one_chance_in_the_mean():
    tokenizer = work.tokenizer_of(TINY)
    policy, _ = work.models_of(TINY, tokenizer, 0)
    ids = torch.randint(0, 500, (4, 32), generator=torch.Generator().manual_seed(0))
    p = policy.eval()(ids).logits.softmax(-1)
    assert p[..., tokenizer.eos_token_id].mean().item() == pytest.approx(1 / TINY.mean_response, rel=0.05)
    assert p[..., tokenizer.pad_token_id].max() < 1e-9


def test_a_feed_gives_every_row_once_a_step_whatever_is_asked_for():
    feed = Feed([[1], [2], [3]], times=2)
    assert [feed[i]["input_ids"] for i in (5, 0, 3, 3, 1, 2)] == [[1], [2], [3], [1], [2], [3]]
    assert len(feed) == 6


def result(**changes):
    return {"prompt_tokens": 10, "updates": 4, "steps": [{"learn": 2.0}], "response_tokens": [5, 6]} | changes


def test_sides_that_did_not_do_the_same_are_refused():
    check_equal({"rlhf": result(), "trl": result(response_tokens=[7, 8])})  # lengths are drawn, not set
    for name, other in (("prompt_tokens", 11), ("updates", 8), ("steps", [])):
        with pytest.raises(UserError, match=name):
            check_equal({"rlhf": result(), "trl": result(**{name: other})})


def test_spread():
    assert spread([3.0, 1.0, 2.0, 5.0]) == {"min": 1.0, "median": 2.5, "max": 5.0}


def test_a_comparison_from_end_to_end(capsys):
    given = {"shape": "tiny", "work": "evaluation", "precision": "fp32", "steps": 2}
    found = compare(given, 1, None)
    ours, plain = (found["pairs"][0][side] for side in ("rlhf", "trl"))
    assert ours["prompt_tokens"] == plain["prompt_tokens"] > 0
    assert 8 <= ours["response_tokens"][1] <= 8 * 16
    assert found["ratio"]["min"] == found["ratio"]["max"] > 0
    words = table(found)
    assert f"pair by pair: {found['ratio']['min']:.2f}\n" in words
    assert "GFLOP needed by the last step: not counted\n" in words


def test_the_work_of_our_side_is_that_of_its_models(tmp_path):
    result = rlhf(work.Run(TINY, steps=2, precision="fp32"), str(tmp_path))
    assert result["longest_prompt"] <= 256
    assert result["updates"] == 2 * TINY.n_ppo_epochs
    tokens = result["prompt_tokens"] + result["response_tokens"][1]
    # Two layers of 12 x 32^2 weights: 2 a weight and token forward, 4 backward; policy and critic, each PPO epoch.
    # Attention and the output embeddings come on top.
    least = 6 * 2 * 12 * 32**2 * tokens * 2 * TINY.n_ppo_epochs
    assert least < result["flops"]["learn"] < 3 * least
    # Forward alone, of four roles.
    assert least / 3 < result["flops"]["score"] * TINY.n_ppo_epochs / 2 < least


@pytest.mark.parametrize(("trl", "found"), [([], "none"), (["--trl", "nowhere"], "nowhere")])
def test_a_missing_trl_is_one_line(monkeypatch, trl, found):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *trl])
    with pytest.raises(UserError, match=f"^trl: expected a folder made by .*, found {found}$"):
        benchmark.main()


def test_the_exponent_of_a_power_is_its_power():
    assert exponent([1, 2, 8], [3, 12, 192]) == pytest.approx(2)
    found = {"name": "x", "values": [1, 2], "seconds": [1.0, 2.0], "mib": [5.0, 5.0]}
    line = growth_table([found | {"exponents": {"time": 1.0, "memory": 0.0}}])
    assert line == "x: 1: 1.00 s, 5 MiB; 2: 2.00 s, 5 MiB; time ~ x^1.00, memory ~ x^0.00"
