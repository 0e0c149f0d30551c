"""Per-token estimates of KL(policy || reference) from the log-probs of sampled tokens."""

from torch import Tensor


def kl_penalty(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """float [B, T] x2 -> float [B, T], nats, unmasked (J. Schulman, "Approximating KL Divergence", 2020).

    With r = ref/policy on a token that the policy sampled: "k1" is -log r, unbiased, of either sign;
    "k3" is r - 1 - log r, unbiased, never negative, with less variance.
    """
    difference = logp - ref_logp
    if estimator == "k1":
        return difference
    if estimator == "k3":
        return (-difference).exp() - 1 + difference
    raise ValueError(f"kl_estimator: expected 'k1' or 'k3', found {estimator!r}")
