"""From a raw score to the number PPO learns from: centred, scaled, clipped, each only where asked for."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.functional.gae import Moments, moments, wide


class ScoreScaler:
    """score -> (score - mean) / std of the reference's samples -> running scaling -> clip.

    The first is Ziegler et al. 2019 (arXiv:1909.08593, section 2.1: mean 0 and variance 1 under the reference);
    the second is that of TRL up to 0.11 (Zheng et al. 2023, arXiv:2307.04964).
    """

    def __init__(self, args: PPOConfig) -> None:
        self.args = args
        self.mean, self.std = 0.0, 1.0  # of the reference's samples; plain numbers, which cost no copy to a device
        self.sums = torch.zeros(3, dtype=torch.float64)  # count, sum and sum of squares of all scores so far

    def fit(self, raw: Tensor, real: Tensor, all_sum: Callable[[Tensor], Tensor]) -> Moments:
        """Take mean and standard deviation from scores of the reference's responses, float [B], over all ranks."""
        count, total, squares = all_sum(_sums(raw, real)).cpu().double()
        m = moments(total, squares, count)
        m = Moments(m.mean.float(), m.std.float().clamp(min=1e-6))
        self.mean, self.std = m.mean.item(), m.std.item()
        return m

    def __call__(self, raw: Tensor, real: Tensor, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
        """float [B], reward units -> float [B], what PPO learns from. real: bool [B], False on filler rows."""
        args = self.args
        score = (raw - self.mean) / self.std
        if args.use_score_scaling:
            self.sums = self.sums + all_sum(_sums(score, real)).cpu()
            m = moments(self.sums[1], self.sums[2], self.sums[0])
            std = m.std.to(score) + 1e-8
            score = (score - m.mean.to(score)) / std if args.use_score_norm else score / std
        return score if args.score_clip is None else score.clamp(-args.score_clip, args.score_clip)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""
        return {"mean": torch.tensor(self.mean), "std": torch.tensor(self.std), "sums": self.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint."""
        self.mean, self.std, self.sums = state["mean"].item(), state["std"].item(), state["sums"]


def _sums(x: Tensor, real: Tensor) -> Tensor:
    x = wide(torch.where(real, x, 0))
    return torch.stack([real.sum().to(x), x.sum(), (x**2).sum()])
