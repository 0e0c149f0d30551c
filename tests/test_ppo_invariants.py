"""What must hold whatever is configured: at learning rate 0 nothing moves, and no split of a batch matters."""

import pytest
import tiny
import torch
from tiny_ppo import metrics, trainer
from torch.testing import assert_close

RAGGED = [{"prompt": "a b c d e f g h i j k l m n o p"[: 4 * i + 1]} for i in range(8)]
SPLITS = [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4)]  # gradient accumulation, minibatches
PRECISIONS = ["fp32", "bf16 autocast", "bf16 weights"]


def run_at_0(folder, family, precision, **options):
    """Two PPO steps at learning rate 0, from bf16 weights or under bf16 autocast where asked for."""
    given = {}
    if precision == "bf16 weights":
        make_policy, make_reward = (
            (tiny.gpt2, tiny.gpt2_reward) if family == "gpt2" else (tiny.llama, tiny.llama_reward)
        )
        given = {"model": make_policy().bfloat16(), "reward_model": make_reward().bfloat16()}
    bf16 = precision == "bf16 autocast"
    trainer(folder, family, given=given, learning_rate=0.0, max_steps=2, bf16=bf16, **options).train()
    return metrics(folder)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("padding", ["equal", "ragged"])
@pytest.mark.parametrize(("accumulation", "minibatches"), SPLITS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_at_learning_rate_0_nothing_moves(tmp_path, family, accumulation, minibatches, padding, precision):
    options = {"gradient_accumulation_steps": accumulation, "num_mini_batches": minibatches}
    rows = RAGGED if padding == "ragged" else [{"prompt": "same"}] * 8
    # A micro-batch is summed in another order than the rollout's batch, which bf16 shows: 24 tokens a response are
    # enough for the mean to see past it. Where the batch is not split, both are the same sum.
    limits = {"ratio": 1e-6, "approxkl": 1e-12} if precision == "fp32" else {"ratio": 1e-3, "approxkl": 1e-5}
    if (accumulation, minibatches) == (1, 1):
        limits["approxkl"] = 1e-10  # of 48 tokens: no single ratio is 1e-4 away from 1
    limits["largest"] = 3e-2 if limits["approxkl"] == 1e-5 else 1e-4
    for row in run_at_0(tmp_path, family, precision, rows=rows, response_length=24, **options):
        assert row["val/ratio"] == pytest.approx(1, abs=limits["ratio"])
        assert row["val/ratio_max"] == pytest.approx(1, abs=limits["largest"])
        assert row["policy/approxkl_avg"] < limits["approxkl"]
        assert row["policy/clipfrac_avg"] == 0
        assert abs(row["objective/kl"]) < 1e-5  # reference and policy take the same path in every precision
        assert row["objective/kl_exact_per_token"] < 1e-6


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora_and_checkpointed_activations_keep_still_too(tmp_path, family, lora):
    for row in run_at_0(tmp_path, family, "fp32", lora=lora, rows=RAGGED, gradient_checkpointing=True):
        assert row["val/ratio"] == pytest.approx(1, abs=1e-5)
        assert row["policy/clipfrac_avg"] == 0
        assert abs(row["objective/kl"]) < 1e-5


def test_generation_settings_of_the_model_leak_into_nothing(tmp_path):
    policy = tiny.llama()
    settings = policy.generation_config
    settings.repetition_penalty, settings.top_p, settings.top_k, settings.do_sample = 5.0, 0.5, 3, True
    before = settings.to_dict()
    run = trainer(tmp_path, given={"model": policy}, learning_rate=0.0, max_steps=1)
    run.train()
    (row,) = metrics(tmp_path)
    assert (row["policy/clipfrac_avg"], row["policy/approxkl_avg"] < 1e-10) == (0, True)
    assert policy.generation_config.to_dict() == before


@pytest.mark.parametrize(("accumulation", "minibatches"), SPLITS)
@pytest.mark.parametrize("epochs", [1, 3])
def test_optimizer_steps_are_epochs_times_minibatches(tmp_path, accumulation, minibatches, epochs):
    options = {"gradient_accumulation_steps": accumulation, "num_mini_batches": minibatches, "num_ppo_epochs": epochs}
    run = trainer(tmp_path, rows=RAGGED, max_steps=1, **options)
    count = []
    run.optimizer.optimizer.register_step_post_hook(lambda *_: count.append(1))
    run.train()
    assert len(count) == metrics(tmp_path)[0]["val/updates"] == epochs * minibatches


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_split_of_a_batch_gives_the_same_gradient(tmp_path, size):
    moved = []
    for micro in (8, size):
        options = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro}
        run = trainer(tmp_path / f"{len(moved)}", rows=RAGGED, max_steps=1, optim="sgd", max_grad_norm=0.0, **options)
        run.train()
        moved.append(dict(run.roles.trained.named_parameters()))
    for name, value in moved[0].items():
        assert_close(moved[1][name], value, atol=1e-6, rtol=1e-5)


def test_an_update_stops_where_target_kl_is_passed(tmp_path):
    free = trainer(tmp_path / "free", learning_rate=0.05, num_ppo_epochs=4, max_steps=1)
    held = trainer(tmp_path / "held", learning_rate=0.05, num_ppo_epochs=4, max_steps=1, target_kl=1e-3)
    for run in (free, held):
        run.train()
    assert metrics(tmp_path / "free")[0]["val/updates"] == 4
    assert metrics(tmp_path / "held")[0]["val/updates"] == 1  # the second pass sees what the first step did


def test_large_gradients_are_clipped_and_logged_as_they_were(tmp_path):
    run = trainer(tmp_path, max_grad_norm=1e-3, optim="sgd", learning_rate=1.0, num_ppo_epochs=1, max_steps=1)
    before = [p.detach().clone() for p in run.roles.trained.policy.parameters()]
    run.train()
    moved = [a - b for a, b in zip(run.roles.trained.policy.parameters(), before, strict=True)]
    assert torch.stack([m.norm() for m in moved]).norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert metrics(tmp_path)[0]["policy/grad_norm"] > 1e-2
