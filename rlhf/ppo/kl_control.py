"""How strongly KL to the reference is punished."""

CLIP = 0.2  # of the relative error
_SMALLEST = 0.1  # factor of one update


class AdaptiveKLController:
    """Proportional controller of the KL coefficient (Ziegler et al. 2019, arXiv:1909.08593, eq. 4).

    kl_coef: starting coefficient, reward units per nat; target: wanted KL per token, nats;
    horizon: samples over which a constant full-size error multiplies the coefficient by about e^0.2.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        self.kl_coef = kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> float:
        """Measured KL per token and samples seen since the last update -> the new coefficient."""
        error = min(max(kl / self.target - 1, -CLIP), CLIP)
        # A coefficient of 0 would stay there, and one below would reward KL: n is to be under horizon / CLIP, which
        # PPOConfig sees to for its batch size, but not for rows that a loop of one's own brings.
        self.kl_coef *= max(1 + error * n / self.horizon, _SMALLEST)
        return self.kl_coef

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.kl_coef = state["kl_coef"]
