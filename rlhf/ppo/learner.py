"""Learn: a few clipped optimizer steps on one rollout, the same however the rows are split."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.distributed.collectives import all_rows, all_sum, full_tensor, sum_and_max
from rlhf.distributed.launch import is_deepspeed
from rlhf.distributed.sharding import step_taken
from rlhf.file_types import SkippedRow
from rlhf.functional.batching import passes_of
from rlhf.functional.gae import wide
from rlhf.functional.losses import policy_loss, value_loss
from rlhf.models.actor_critic import ActorCritic, Texts, texts_of
from rlhf.ppo.advantages import Advantages
from rlhf.ppo.rollout import Rollout, row_facts
from rlhf.tracking.skipped_updates import Skips, json_number


class Statistics(NamedTuple):
    """Of a micro-batch, or summed over several; each float []. Losses are divided by global token counts already."""

    policy_loss: Tensor
    value_loss: Tensor
    # Sums over response tokens:
    approxkl: Tensor  # half the squared log-ratio, nats²
    clipfrac: Tensor  # ratios outside cliprange
    value_clipfrac: Tensor  # values further than cliprange_value from the old ones
    entropy: Tensor  # nats
    ratio: Tensor
    ratio_squared: Tensor


@dataclass(frozen=True)
class Update:
    """What `Learner.learn` did on this rank; optimizer steps that were skipped are left out of the statistics."""

    statistics: Statistics  # float64
    tokens: int  # response tokens that they are summed over
    ratio_max: Tensor  # float64 []: the largest ratio of a token
    norms: Tensor  # float64 [2]: gradient norms of policy and critic in the last step, the same on all ranks
    minibatches: int  # looked at; these three counts are the same on all ranks
    updates: int  # optimizer steps taken
    skipped: int  # optimizer steps skipped, since a loss or gradient was not finite
    passes: list[list[int]]  # rows of each pass; none where the rank had no rows left


@dataclass(frozen=True)
class Pass:
    """Rows that go through the models together."""

    rows: list[int]  # of this rank's rollout; none where the rank has no rows left
    texts: Texts
    counts: Tensor  # bool [N], False on tokens that count for nothing


@dataclass(frozen=True)
class Minibatch:
    """What one optimizer step is made of."""

    passes: list[Pass]
    n_tokens: int  # response tokens over all ranks, at least 1
    n_local: int  # response tokens on this rank


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
        backend = DeepSpeedBackend if is_deepspeed(accelerator) else PlainBackend
        self.backend = backend(model, optimizer, accelerator, args, event)
        self.skips = skips or Skips(args.max_skipped_updates)

    def learn(self, rollout: Rollout, advantages: Advantages, step: int) -> Update:
        """num_ppo_epochs passes, num_mini_batches optimizer steps per pass (fewer if there are fewer rows).

        In the first critic_warmup_steps PPO steps only the critic learns. With target_kl the update stops once a
        minibatch's approximate KL to the rollout's policy exceeds 1.5 times target_kl: before the optimizer step of
        that minibatch, or under DeepSpeed after it. An optimizer step whose loss or gradient is not finite is skipped,
        on all ranks; after max_skipped_updates in a row the run ends with a UserError.
        """
        self.model.train()
        device = rollout.ids.device
        total = wide(torch.zeros(len(Statistics._fields), device=device))
        ratio_max, norms, n_tokens = total[0], total[:2], 0
        minibatches = updates = skipped = 0
        passes: list[list[int]] = []
        policy_learns = step > self.args.critic_warmup_steps
        old = torch.stack([rollout.logp, rollout.values, advantages.advantages, advantages.returns]).flatten(1)
        for batch in self._plan(rollout, step):
            table = self._accumulate_gradients(old, batch, policy_learns)
            found = Statistics(*table[:, :-1].unbind(1))
            passes += [one.rows for one in batch.passes]
            stop = self._exceeds_target_kl(found.approxkl.sum(), batch.n_tokens)
            held_back = stop and self.backend.can_hold_back
            if held_back:  # its gradients are dropped, but what it showed counts
                step_norms, taken = norms, False
            else:
                step_norms, taken = self.backend.step(policy_learns, step)
            minibatches, updates = minibatches + 1, updates + taken
            if taken or held_back:
                total, n_tokens, norms = total + table[:, :-1].sum(0), n_tokens + batch.n_local, step_norms
                ratio_max = torch.maximum(ratio_max, table[:, -1].max())
                self.skips.in_a_row = 0
            else:
                skipped += 1
                losses = torch.stack([found.policy_loss, found.value_loss], 1)
                self._record_skipped(step, update_rows(rollout, advantages, batch, losses), step_norms)
            if stop:
                self.optimizer.zero_grad()
                break
        self.model.eval()
        statistics = Statistics(*total.unbind())
        return Update(statistics, n_tokens, ratio_max, norms, minibatches, updates, skipped, passes)

    def skip(self, step: int, rows: Sequence[SkippedRow]) -> Update:
        """A PPO step whose rollout is not finite: it counts as one skipped update. rows: see `nonfinite_rows`."""
        self.skips.report(step, sorted({what for row in rows for what in row["not_finite"]}), rows)
        zeros = wide(torch.zeros(len(Statistics._fields), device=self.accelerator.device))
        return Update(Statistics(*zeros.unbind()), 0, zeros[0], zeros[:2], 0, 0, 1, [])

    def _record_skipped(self, step: int, rows: list[SkippedRow], norms: Tensor) -> None:
        rows = all_rows(rows)
        lost = any(isinstance(loss, str) for row in rows for loss in (row["policy_loss"], row["value_loss"]))
        what = ["loss", "gradient"] if lost else ["gradient"]
        self.skips.report(step, what, rows, grad_norm=[json_number(norm) for norm in norms])

    def _exceeds_target_kl(self, approxkl: Tensor, n_tokens: int) -> bool:
        if self.args.target_kl is None:
            return False
        return bool(all_sum(self.accelerator, approxkl.reshape(1)) / n_tokens > 1.5 * self.args.target_kl)

    def _plan(self, rollout: Rollout, step: int) -> list[Minibatch]:
        """All optimizer steps of an update: which rows meet in which pass, and their texts on the device.

        Rows are dealt to minibatches by their position in the global batch, so that the number of ranks does not decide
        which rows meet in an optimizer step. Every rank makes the same number of passes: one without rows left takes
        part with a row that counts for nothing. One collective for the whole update, none with a single process.
        """
        prompts, responses = [prompt.input_ids for prompt in rollout.prompts], rollout.responses
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        n_global, width = rollout.shard.n_items, rollout.mask.shape[1]
        row_at = {position: row for row, position in enumerate(rollout.shard.rows) if position >= 0}
        device, dealt = self.accelerator.device, self._deal(n_global, step)
        packed = self.accelerator.unwrap_model(self.model).packs(max(lengths))
        mine = [[row_at[place] for place in members if place in row_at] for members in dealt]
        groups = [self._group(rows, lengths, packed) for rows in mine]
        counts = [0] * n_global  # response tokens
        for place, row in row_at.items():
            counts[place] = len(responses[row])
        counts, rounds = sum_and_max(self.accelerator, counts, [len(group) for group in groups])
        filled = [group + [[]] * (max(1, most) - len(group)) for group, most in zip(groups, rounds, strict=True)]
        texts = iter(texts_of(prompts, responses, [rows or [0] for group in filled for rows in group], width, device))
        longest = max(map(len, responses)) * max(len(rows) for group in filled for rows in [*group, [0]])
        counting = torch.ones(2, longest, dtype=torch.bool, device=device)
        counting[0] = False
        return [
            Minibatch(
                [Pass(rows, one := next(texts), counting[int(bool(rows)), : len(one.tokens)]) for rows in group],
                max(sum(counts[place] for place in members), 1),
                sum(len(responses[row]) for rows in group for row in rows),
            )
            for group, members in zip(filled, dealt, strict=True)
        ]

    def _deal(self, n_global: int, step: int) -> list[list[int]]:
        """The positions of the global batch in each minibatch, the same on all ranks."""
        dealt: list[list[int]] = []
        for epoch in range(self.args.num_ppo_epochs):
            generator = torch.Generator().manual_seed((self.args.seed * 1_000_003 + step) * 1_009 + epoch)
            order = torch.randperm(n_global, generator=generator)
            parts = order.tensor_split(min(self.args.num_mini_batches, n_global))
            dealt += [members.tolist() for members in parts]
        return dealt

    def _group(self, rows: list[int], lengths: Sequence[int], packed: bool) -> list[list[int]]:
        """This rank's rows of a minibatch as passes. lengths: of all its texts; packed: they go through unpadded."""
        most, budget = self.args.per_device_train_batch_size, self.args.micro_batch_tokens
        rows, kind = sorted(rows), self.accelerator.device.type
        near = passes_of([lengths[row] for row in rows], most, kind, budget, packed)
        return [[rows[i] for i in group] for group in near]

    def _accumulate_gradients(self, old: Tensor, batch: Minibatch, policy_learns: bool) -> Tensor:
        """Forward and backward over one optimizer step's passes: float64 [passes, Statistics and the largest ratio]."""
        parts = []
        # Counted from 0 at each optimizer step, so that gradients are synchronised at its last micro-batch.
        self.accelerator.step = 0
        self.accelerator.gradient_accumulation_steps = len(batch.passes)
        with self.backend.policy_rate(policy_learns):
            for one in batch.passes:
                with self.accelerator.accumulate(self.model):
                    parts.append(self._backward(old, one, batch, float(policy_learns)))
                self.event("on_substep_end")
        return wide(torch.stack(parts))

    def _backward(self, old: Tensor, one: Pass, batch: Minibatch, policy: float) -> Tensor:
        """old: float [4, B * T], what the rollout and its advantages say of each token. Nothing in here waits."""
        args, mask = self.args, one.counts
        old_logp, old_values, advantages, returns = old.index_select(1, one.texts.places)
        with self.accelerator.autocast():
            logp, entropy, values = self.model(one.texts)
        pg = policy_loss(logp, old_logp, advantages, mask, args.cliprange, batch.n_tokens)
        vf = value_loss(values, old_values, returns, mask, args.cliprange_value, batch.n_tokens)
        loss = policy * pg + args.vf_coef * vf
        # The gradient of a loss that is not finite may be finite: times NaN it is not, and all ranks see that in the
        # mean of their gradients, without another collective.
        finite = torch.where(loss.detach().isfinite(), 1.0, math.nan)
        self.accelerator.backward(loss * finite * self.backend.loss_scale(len(batch.passes)))
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
            sums = torch.where(mask, torch.stack([x.float() for x in per_token]), 0).sum(1)
            return torch.cat([torch.stack([pg, vf]), sums, torch.where(mask, ratio, 0).amax(0, keepdim=True)])


class PlainBackend:
    """How an optimizer step is taken without DeepSpeed: one process, several, or FSDP2."""

    can_hold_back = True  # a step can be decided on after the backward pass

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        args: PPOConfig,
        event: Callable[[str], None],
    ) -> None:
        self.model, self.optimizer, self.accelerator, self.args, self.event = model, optimizer, accelerator, args, event

    def loss_scale(self, n_passes: int) -> int:
        """What undoes the means that Accelerate takes over micro-batches and ranks.

        The loss is divided by the global token count already; see Accelerate's example
        gradient_accumulation_for_autoregressive_models.py.
        """
        return self.accelerator.num_processes * n_passes

    @contextmanager
    def policy_rate(self, learns: bool) -> Iterator[None]:
        """Nothing to do before the step."""
        yield

    def step(self, policy_learns: bool, step: int) -> tuple[Tensor, bool]:
        """Clip and step: the gradient norms of policy and critic, float64 [2], and whether the step was taken."""
        model: ActorCritic = self.accelerator.unwrap_model(self.model)
        # Policy and critic share no loss: a large value error must not shrink the policy's gradient.
        limit = self.args.max_grad_norm if self.args.max_grad_norm > 0 else float("inf")
        self.accelerator.unscale_gradients()
        norms = torch.stack(
            [
                full_tensor(torch.nn.utils.clip_grad_norm_([p for p in part.parameters() if p.requires_grad], limit))
                for part in (model.policy, model.critic)
            ]
        )
        norms = wide(norms)
        finite = bool(norms.isfinite().all())  # the ranks' gradients are averaged: all see the same
        if not policy_learns:  # without a gradient, an optimizer leaves a parameter and its moments as they are
            for parameter in model.policy.parameters():
                parameter.grad = None
        if finite or self.args.fp16:  # fp16's scaler must see what overflowed; it skips the step itself
            self.event("on_pre_optimizer_step")
            self.optimizer.step()
            self.event("on_optimizer_step")
        self.optimizer.zero_grad()
        return norms, finite


class DeepSpeedBackend(PlainBackend):
    """DeepSpeed takes the optimizer step inside the last backward pass, with one gradient norm for both models."""

    can_hold_back = False

    def loss_scale(self, n_passes: int) -> int:
        """DeepSpeed takes the mean over ranks, and with one accumulation step none over micro-batches."""
        return self.accelerator.num_processes

    @contextmanager
    def policy_rate(self, learns: bool) -> Iterator[None]:
        """A learning rate of 0 keeps the policy as it is. (Adam still counts the step.)"""
        held = [] if learns else [group for group in self.optimizer.param_groups if group.get("role") == "policy"]
        rates = [group["lr"] for group in held]
        for group in held:
            group["lr"] = 0.0
        yield
        for group, rate in zip(held, rates, strict=True):
            group["lr"] = rate

    def step(self, policy_learns: bool, step: int) -> tuple[Tensor, bool]:
        """What DeepSpeed did: its norm, twice, and whether it took the step."""
        norm, taken = step_taken(self.model, step)
        return torch.tensor([norm, norm], dtype=torch.float64), taken


def update_rows(rollout: Rollout, advantages: Advantages, batch: Minibatch, losses: Tensor) -> list[SkippedRow]:
    """This rank's rows of a skipped optimizer step. losses: [passes, 2], policy and value, of each micro-batch."""
    rows = []
    for one, (policy, value) in zip(batch.passes, losses.tolist(), strict=True):
        for i in one.rows:
            row = row_facts(rollout, i)
            row["advantage"] = json_number(advantages.advantages[i].abs().max())
            row["return"] = json_number(advantages.returns[i].abs().max())
            row["policy_loss"], row["value_loss"] = json_number(policy), json_number(value)  # of its micro-batch
            rows.append(row)
    return rows
