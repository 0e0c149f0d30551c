"""Ziegler et al. 2019, eq. 4, by hand."""

import pytest
from tiny_ppo import trainer

from rlhf.config import PPOConfig
from rlhf.errors import UserError
from rlhf.ppo.advantages import AdaptiveKLController


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.05, 0.1), (0.055, 0.1 * (1 + 0.1 * 64 / 1000)), (5.0, 0.1 * (1 + 0.2 * 0.064)), (0.0, 0.1 * (1 - 0.2 * 0.064))],
)
def test_the_coefficient_follows_the_error(kl, expected):
    assert AdaptiveKLController(0.1, 0.05, 1000).update(kl, 64) == pytest.approx(expected)


def test_the_coefficient_stays_positive():
    """8 samples: 1 - 0.2 * 8 / 2 = 0.2, and with a horizon of 0.5 it would be 1 - 3.2 = -2.2."""
    assert AdaptiveKLController(0.1, 0.05, 2).update(0.0, 8) == pytest.approx(0.02)
    control = AdaptiveKLController(0.1, 0.05, 0.5)
    assert control.update(0.0, 8) == pytest.approx(0.01)
    assert control.update(5.0, 8) == pytest.approx(0.01 * 4.2)  # upwards the formula is left alone


def config(**options):
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    return PPOConfig(output_dir="unused", use_cpu=True, bf16=False, **sizes, **options)


@pytest.mark.parametrize("horizon", [0.5, 1.6])
def test_a_horizon_under_a_fifth_of_the_batch_is_refused(horizon):
    with pytest.raises(UserError, match=rf"^kl_horizon: expected more than 0.2 x 8 .* = 1.6, found {horizon}$"):
        config(kl_target=0.05, kl_horizon=horizon)
    assert config(kl_target=0.05, kl_horizon=1.7).kl_horizon == 1.7
    assert config(kl_horizon=0.5).kl_target is None  # a fixed coefficient has no horizon


@pytest.mark.parametrize("options", [{"kl_coef": -0.1}, {"kl_target": 0.0}, {"kl_target": -1.0}, {"kl_horizon": 0.0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(UserError, match=f"^{next(iter(options))}: expected "):
        config(**options)


def test_a_step_with_nothing_finite_moves_no_coefficient(tmp_path):
    def broken(completions, **_):
        return [float("nan")] * len(completions)

    run = trainer(tmp_path, reward=broken, kl_target=0.1, kl_coef=0.2, kl_horizon=100, max_steps=1)
    run.train()
    assert run.kl_control.kl_coef == 0.2
