"""Parameter groups: what is decayed, and at which rate each role learns."""

from types import SimpleNamespace

import pytest
from torch import nn
from transformers import Trainer

from rlhf.errors import UserError
from rlhf.ppo.optim import count_steps, make_optimizer, optimizer_groups


def test_matrices_alone_are_decayed_and_each_role_has_its_rate():
    policy = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2, bias=False))
    policy[2].requires_grad_(False)
    trained = SimpleNamespace(policy=policy, critic=nn.Linear(2, 1))
    args = SimpleNamespace(learning_rate=1e-3, critic_learning_rate=None, weight_decay=0.1)
    for critic_rate in (None, 5e-4):
        args.critic_learning_rate = critic_rate
        groups = optimizer_groups(trained, args)
        found = [(g["role"], g["lr"], g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups]
        assert found == [
            ("policy", 1e-3, 0.1, [2]),
            ("policy", 1e-3, 0.0, [1, 1, 1]),
            ("critic", critic_rate or 1e-3, 0.1, [2]),
            ("critic", critic_rate or 1e-3, 0.0, [1]),
        ]


@pytest.mark.parametrize(
    ("prompts", "size", "epochs", "steps"),
    [
        (10, 4, 1, 3),  # 4, 4 and 2
        (10, 4, 2.0, 6),
        (10, 4, 0.5, 2),  # 5 prompts
        (10, 4, 0.8, 2),
        (10, 4, 1.1, 4),  # one more prompt is one more step
        (3, 8, 0.1, 1),
    ],
)
def test_every_prompt_that_epochs_ask_for_is_in_a_step(prompts, size, epochs, steps):
    args = SimpleNamespace(max_steps=-1, total_episodes=None, num_train_epochs=epochs)
    assert count_steps(args, prompts, size) == steps


def test_max_steps_counts_before_episodes_and_these_before_epochs():
    args = SimpleNamespace(max_steps=-1, total_episodes=9, num_train_epochs=1)
    assert count_steps(args, 100, 4) == 3
    args.max_steps = 7
    assert count_steps(args, 100, 4) == 7
    args.max_steps, args.total_episodes = 1, 8
    assert count_steps(args, 100, 4) == 1
    args.max_steps = 0  # none asked for
    assert count_steps(args, 100, 4) == 2
    args.total_episodes = 0
    assert count_steps(args, 100, 4) == 1


def test_an_optimizer_that_is_not_there_is_named(monkeypatch):
    def missing(args):
        raise ImportError("install it")

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", missing)
    with pytest.raises(UserError, match=r"^optim: adamw_x is unavailable: install it$"):
        make_optimizer(SimpleNamespace(optim="adamw_x"), None, (None, None), 1)
