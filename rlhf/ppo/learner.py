"""Learn: a few clipped steps on one rollout, the same however the rows are split."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.functional.losses import policy_loss, value_loss
from rlhf.models.actor_critic import ActorCritic
from rlhf.ppo.rollout import Rollout, Targets, trim
from rlhf.runtime.distributed import all_sum

SUMS = (
    "loss/policy",
    "loss/value",
    "approxkl",
    "clipfrac",
    "value_clipfrac",
    "entropy",
    "ratio",
    "ratio_squared",
)


class Learner:
    """Holds what an update needs; `learn` is the update."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        args: PPOConfig,
    ) -> None:
        self.model, self.optimizer, self.accelerator, self.args = model, optimizer, accelerator, args

    def learn(
        self, rollout: Rollout, targets: Targets, positions: Tensor, n_global: int, step: int
    ) -> dict[str, Tensor]:
        """num_ppo_epochs passes, num_mini_batches optimizer steps a pass (fewer when there are fewer rows).

        positions: int [B], each local row's place in the global batch of n_global rows. Returns sums over this
        rank (losses, already divided by global counts, and per-token statistics), each float64 [], under the
        names in SUMS, "tokens" that were summed over, and the last gradient norms of policy and critic.
        """
        self.model.train()
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=rollout.ids.device)
        norms = torch.zeros(2, dtype=torch.float64, device=rollout.ids.device)
        tokens = torch.zeros((), dtype=torch.float64, device=rollout.ids.device)
        for epoch in range(self.args.num_ppo_epochs):
            for groups in self._minibatches(rollout, positions, n_global, step, epoch):
                n_local = sum(rollout.mask[index].sum() for index in groups)
                n_tokens = all_sum(self.accelerator, torch.as_tensor(n_local).reshape(1)).squeeze().clamp(min=1)
                for index in self._accumulate(groups):
                    sums += self._backward(rollout, targets, index, n_tokens, len(groups))
                norms = self._step()
                tokens += n_local
        self.model.eval()
        result: dict[str, Tensor] = dict(zip(SUMS, sums.unbind(), strict=True))
        return result | {"tokens": tokens, "grad_norm": norms[0], "grad_norm_critic": norms[1]}

    def _minibatches(
        self, rollout: Rollout, positions: Tensor, n_global: int, step: int, epoch: int
    ) -> Iterator[list[Tensor]]:
        """For each optimizer step, this rank's rows as micro-batches; their number is the same on all ranks,
        so some may be empty.

        Rows are dealt to minibatches by their place in the global batch, so that the number of ranks does not
        decide which rows meet in an optimizer step.
        """
        generator = torch.Generator().manual_seed((self.args.seed * 1_000_003 + step) * 1_009 + epoch)
        world = self.accelerator.num_processes
        steps = min(self.args.num_mini_batches, n_global)
        for members in torch.randperm(n_global, generator=generator).tensor_split(steps):
            mine = torch.isin(positions.cpu(), members).nonzero().squeeze(1)
            most = max(int((members % world == rank).sum()) for rank in range(world))
            count = max(1, -(-most // self.args.per_device_train_batch_size))
            mine = mine[rollout.attention[mine].sum(1).argsort().cpu()] if len(mine) else mine
            yield list(mine.tensor_split(count))

    def _accumulate(self, groups: list[Tensor]) -> Iterator[Tensor]:
        # Counted from 0 at each optimizer step, so that gradients are synchronised at its last micro-batch.
        self.accelerator.step = 0
        self.accelerator.gradient_accumulation_steps = len(groups)
        for index in groups:
            with self.accelerator.accumulate(self.model):
                yield index

    def _backward(self, rollout: Rollout, targets: Targets, index: Tensor, n_tokens: Tensor, parts: int) -> Tensor:
        args = self.args
        # A rank that has run out of rows still takes part in the pass, with a row that counts for nothing.
        counts = len(index) > 0
        index = index if counts else torch.zeros(1, dtype=torch.long)
        columns, width = trim(rollout.attention, rollout.mask, index)
        mask = rollout.mask[index, :width] & counts
        old_logp, old_values = rollout.logp[index, :width], rollout.values[index, :width]
        with self.accelerator.autocast():
            logp, entropy, values = self.model(rollout.ids[index, columns], rollout.attention[index, columns], width)
        pg = policy_loss(logp, old_logp, targets.advantages[index, :width], mask, args.cliprange, n_tokens)
        vf = value_loss(values, old_values, targets.returns[index, :width], mask, args.cliprange_value, n_tokens)
        # The loss is divided by the global token count already. Accelerate divides by the micro-batches and
        # the ranks' gradients are averaged: both are undone here, as in Accelerate's example
        # gradient_accumulation_for_autoregressive_models.py.
        self.accelerator.backward((pg + args.vf_coef * vf) * parts * self.accelerator.num_processes)
        with torch.no_grad():
            log_ratio = torch.where(mask, logp - old_logp, 0)
            ratio = log_ratio.exp()
            per_token = (
                0.5 * log_ratio**2,
                (ratio - 1).abs() > args.cliprange,
                (values - old_values).abs() > args.cliprange_value,
                entropy,
                ratio,
                ratio**2,
            )
            return torch.stack([pg, vf, *(torch.where(mask, x, 0).sum() for x in per_token)]).double()

    def _step(self) -> Tensor:
        model: ActorCritic = self.accelerator.unwrap_model(self.model)
        # Policy and critic share no loss: a large value error must not shrink the policy's gradient.
        limit = self.args.max_grad_norm if self.args.max_grad_norm > 0 else float("inf")
        norms = [
            self.accelerator.clip_grad_norm_([p for p in part.parameters() if p.requires_grad], limit)
            for part in (model.policy, model.critic)
        ]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack([torch.as_tensor(0.0 if norm is None else norm) for norm in norms]).double()
