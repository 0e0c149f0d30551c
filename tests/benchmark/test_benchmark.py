"""The work that both sides do is the work it is said to be."""

import statistics
import sys

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
