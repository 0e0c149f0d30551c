"""Parameter groups: what is decayed, and at which rate each role learns."""

from types import SimpleNamespace

from torch import nn

from rlhf.ppo.optim import optimizer_groups


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
