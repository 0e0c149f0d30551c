"""Learn: a few clipped steps on one rollout, the same however the rows are split."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.functional.losses import policy_loss, value_loss
from rlhf.functional.precision import wide
from rlhf.models.actor_critic import ActorCritic
from rlhf.ppo.rollout import Rollout, Targets, passes, trim
from rlhf.ppo.skipped import update_rows
from rlhf.runtime.distributed import all_max, all_rows, all_sum
from rlhf.runtime.engine import is_deepspeed, step_taken
from rlhf.runtime.skips import Skips, number

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
        event: Callable[[str], None] = lambda name: None,
        skips: Skips | None = None,
    ) -> None:
        """event: called with the name of a TrainerCallback method at each micro-batch and optimizer step."""
        self.model, self.optimizer, self.accelerator, self.args = model, optimizer, accelerator, args
        self.event = event
        self.deepspeed = is_deepspeed(accelerator)
        self.passes: list[Tensor] = []  # rows of each pass of the last update; none where a rank had run out of them
        self.skips = skips or Skips(args.max_skipped_updates)

    def learn(
        self, rollout: Rollout, targets: Targets, positions: Tensor, n_global: int, step: int, ids: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """num_ppo_epochs passes, num_mini_batches optimizer steps a pass (fewer when there are fewer rows).

        positions: int [B], each local row's place in the global batch of n_global rows; ids: of their prompts, for
        skipped.jsonl. In the first critic_warmup_steps steps only the critic learns. With target_kl the update ends,
        before the optimizer step that would follow (under DeepSpeed after it), once a minibatch shows 1.5 times that
        much KL to the rollout's policy.
        An optimizer step whose loss or gradient is not finite is left out, on all ranks alike; after
        max_skipped_updates of them in a row the run ends by a UserError.
        Returns sums over this rank and what was not left out (losses, already divided by global counts, and
        per-token statistics), each float64 [], under the names in SUMS, "tokens" that were summed over, this rank's
        "ratio_max", and, alike on all ranks, "grad_norm" and "grad_norm_critic" of the last update, the
        "minibatches" that were looked at, the "updates" done and those "skipped".
        """
        self.model.train()
        sums = wide(torch.zeros(len(SUMS), device=rollout.ids.device))
        tokens, largest, norms = sums[0], sums[0], sums[:2]
        minibatches = updates = skipped = 0
        self.passes = []
        policy_learns = step > self.args.critic_warmup_steps
        for groups in self._minibatches(rollout, positions, n_global, step):
            n_local = torch.as_tensor(sum(rollout.mask[index].sum() for index in groups))
            n_tokens = all_sum(self.accelerator, n_local.reshape(1)).squeeze().clamp(min=1)
            parts = self._passes(rollout, targets, groups, n_tokens, policy_learns)
            self.passes += groups
            far = self._went_far(parts[:, SUMS.index("approxkl")].sum(), n_tokens)
            held = far and not self.deepspeed
            found, done = (norms, False) if held else self._step(policy_learns, step)
            minibatches, updates = minibatches + 1, updates + done
            if done or held:
                sums, tokens, norms = sums + parts[:, :-1].sum(0), tokens + n_local, found
                largest = torch.maximum(largest, parts[:, -1].max())
                self.skips.in_a_row = 0
            else:
                skipped += 1
                self._left_out(step, update_rows(rollout, targets, groups, parts[:, :2], ids), found)
            if far:
                self.optimizer.zero_grad()
                break
        self.model.eval()
        return _result(sums, (minibatches, updates, skipped), tokens, largest, norms)

    def leave_out(self, step: int, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A PPO step whose rollout is not finite: it counts as one update left out. What `learn` returns, all 0.

        rows: of all ranks, those that are not finite, as `broken_rows` has them.
        """
        self.passes = []
        self.skips.left_out(step, sorted({what for row in rows for what in row["not_finite"]}), rows)
        zeros = wide(torch.zeros(len(SUMS), device=self.accelerator.device))
        return _result(zeros, (0, 0, 1), zeros[0], zeros[0], zeros[:2])

    def _left_out(self, step: int, rows: list[dict[str, Any]], norms: Tensor) -> None:
        rows = all_rows(rows)
        lost = any(isinstance(row[name], str) for row in rows for name in ("policy_loss", "value_loss"))
        what = ["loss", "gradient"] if lost else ["gradient"]
        self.skips.left_out(step, what, rows, grad_norm=[number(norm) for norm in norms])

    def _went_far(self, approxkl: Tensor, n_tokens: Tensor) -> bool:
        if self.args.target_kl is None:
            return False
        return bool(all_sum(self.accelerator, approxkl.reshape(1)) / n_tokens > 1.5 * self.args.target_kl)

    def _minibatches(self, rollout: Rollout, positions: Tensor, n_global: int, step: int) -> Iterator[list[Tensor]]:
        """For each optimizer step, this rank's rows as micro-batches; their number is the same on all ranks,
        so some may be empty.

        Rows are dealt to minibatches by their place in the global batch, so that the number of ranks does not
        decide which rows meet in an optimizer step.
        """
        for epoch in range(self.args.num_ppo_epochs):
            generator = torch.Generator().manual_seed((self.args.seed * 1_000_003 + step) * 1_009 + epoch)
            order = torch.randperm(n_global, generator=generator)
            for members in order.tensor_split(min(self.args.num_mini_batches, n_global)):
                yield self._micro_batches(rollout, positions, members)

    def _micro_batches(self, rollout: Rollout, positions: Tensor, members: Tensor) -> list[Tensor]:
        mine = torch.isin(positions.cpu(), members).nonzero().squeeze(1)
        packed = self.accelerator.unwrap_model(self.model).packs(rollout.attention.shape[1])
        groups = passes(rollout.attention[mine].sum(1), self.args, self.args.per_device_train_batch_size, packed)
        empty = torch.zeros(0, dtype=torch.long)
        return [mine[group] for group in groups] + [empty] * (
            max(1, all_max(self.accelerator, len(groups))) - len(groups)
        )

    def _accumulate(self, groups: list[Tensor]) -> Iterator[Tensor]:
        # Counted from 0 at each optimizer step, so that gradients are synchronised at its last micro-batch.
        self.accelerator.step = 0
        self.accelerator.gradient_accumulation_steps = len(groups)
        for index in groups:
            with self.accelerator.accumulate(self.model):
                yield index

    def _passes(
        self, rollout: Rollout, targets: Targets, groups: list[Tensor], n_tokens: Tensor, policy_learns: bool
    ) -> Tensor:
        """Forward and backward over one optimizer step's micro-batches; float64 [len(groups), len(SUMS) + 1].

        The columns are SUMS and the largest ratio of a token.
        """
        parts = []
        with self._policy_rate(policy_learns):
            for index in self._accumulate(groups):
                parts.append(self._backward(rollout, targets, index, n_tokens, len(groups), float(policy_learns)))
                self.event("on_substep_end")
        return torch.stack(parts)

    def _backward(
        self, rollout: Rollout, targets: Targets, index: Tensor, n_tokens: Tensor, parts: int, policy: float
    ) -> Tensor:
        args = self.args
        # A rank that has run out of rows still takes part in the pass, with a row that counts for nothing.
        counts = len(index) > 0
        index = index if counts else torch.zeros(1, dtype=torch.long)
        columns, width = trim(rollout.attention, rollout.mask, index)
        mask = rollout.mask[index, :width] & counts
        old_logp, old_values = rollout.logp[index, :width], rollout.values[index, :width]
        with self.accelerator.autocast():
            logp, entropy, values = self.model(rollout.ids[index, columns], rollout.attention[index, columns], width)
            values = values[:, :-1]
        pg = policy_loss(logp, old_logp, targets.advantages[index, :width], mask, args.cliprange, n_tokens)
        vf = value_loss(values, old_values, targets.returns[index, :width], mask, args.cliprange_value, n_tokens)
        # The loss is divided by the global token count already. Accelerate divides by the micro-batches (DeepSpeed
        # does not) and the ranks' gradients are averaged: both are undone here, as in Accelerate's example
        # gradient_accumulation_for_autoregressive_models.py.
        scale = self.accelerator.num_processes * (1 if self.deepspeed else parts)
        loss = policy * pg + args.vf_coef * vf
        # The gradient of a loss that is not finite may be: NaN times it is not, and all ranks see that in the mean of
        # theirs, with no collective more.
        finite = torch.where(loss.detach().isfinite(), 1.0, math.nan)
        self.accelerator.backward(loss * finite * scale)
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
            sums = (torch.where(mask, x, 0).sum() for x in per_token)
            return wide(torch.stack([pg, vf, *sums, torch.where(mask, ratio, 0).max()]))

    @contextmanager
    def _policy_rate(self, learns: bool) -> Iterator[None]:
        """DeepSpeed takes its step inside the last backward pass: learning rate 0 keeps the policy as it is."""
        held = (
            [g for g in self.optimizer.param_groups if g.get("role") == "policy"]
            if self.deepspeed and not learns
            else []
        )
        rates = [group["lr"] for group in held]
        for group in held:
            group["lr"] = 0.0
        yield
        for group, rate in zip(held, rates, strict=True):
            group["lr"] = rate

    def _step(self, policy_learns: bool, step: int) -> tuple[Tensor, bool]:
        """The gradient norms of policy and critic, float64 [2], and whether the optimizer took its step."""
        if self.deepspeed:  # stepped and clipped already, with one norm for both
            norm, done = step_taken(self.model, step)
            return torch.tensor([norm, norm], dtype=torch.float64), done
        model: ActorCritic = self.accelerator.unwrap_model(self.model)
        # Policy and critic share no loss: a large value error must not shrink the policy's gradient.
        limit = self.args.max_grad_norm if self.args.max_grad_norm > 0 else float("inf")
        self.accelerator.unscale_gradients()
        norms = torch.stack(
            [
                torch.nn.utils.clip_grad_norm_([p for p in part.parameters() if p.requires_grad], limit)
                for part in (model.policy, model.critic)
            ]
        )
        norms = wide(norms)
        done = bool(norms.isfinite().all())  # the ranks' gradients are averaged: all see the same
        if not policy_learns:  # without a gradient, an optimizer leaves a parameter and its moments as they are
            for parameter in model.policy.parameters():
                parameter.grad = None
        if done or self.args.fp16:  # fp16's scaler has to see what overflowed; it leaves the step out itself
            self.event("on_pre_optimizer_step")
            self.optimizer.step()
            self.event("on_optimizer_step")
        self.optimizer.zero_grad()
        return norms, done


def _result(
    sums: Tensor, counts: tuple[int, int, int], tokens: Tensor, ratio_max: Tensor, norms: Tensor
) -> dict[str, Tensor]:
    result: dict[str, Tensor] = dict(zip(SUMS, sums.unbind(), strict=True))
    result |= {"tokens": tokens, "ratio_max": ratio_max, "grad_norm": norms[0], "grad_norm_critic": norms[1]}
    return result | dict(zip(("minibatches", "updates", "skipped"), wide(torch.tensor(counts)), strict=True))
