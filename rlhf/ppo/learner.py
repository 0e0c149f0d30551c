"""Learn: a few clipped steps on one rollout, the same however the rows are split."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.distributed.collectives import all_rows, all_sum, full_tensor, sum_and_max
from rlhf.distributed.launch import is_deepspeed
from rlhf.distributed.sharding import step_taken
from rlhf.functional.batching import passes_of
from rlhf.functional.gae import wide
from rlhf.functional.losses import policy_loss, value_loss
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.token_logprobs import Texts, texts_of, token_rows
from rlhf.ppo.advantages import Targets
from rlhf.ppo.rollout import Rollout, facts
from rlhf.tracking.skipped_updates import Skips, json_number

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


@dataclass(frozen=True)
class Pass:
    """Rows that go through the models together."""

    rows: list[int]  # of this rank's rollout; none where the rank had run out of them
    texts: Texts
    counts: Tensor  # bool [N], False on tokens that count for nothing


@dataclass(frozen=True)
class Minibatch:
    """What one optimizer step is made of."""

    passes: list[Pass]
    n_tokens: int  # response tokens over all ranks, at least 1
    n_local: int  # and on this one


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
        self.passes: list[list[int]] = []  # rows of each pass of the last update; none where a rank had run out of them
        self.skips = skips or Skips(args.max_skipped_updates)

    def learn(
        self,
        rollout: Rollout,
        targets: Targets,
        positions: Sequence[int],
        n_global: int,
        step: int,
        ids: Sequence[str] = (),
        tokens: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]] | None = None,
    ) -> dict[str, Any]:
        """num_ppo_epochs passes, num_mini_batches optimizer steps a pass (fewer when there are fewer rows).

        positions: each local row's place in the global batch of n_global rows, -1 for filler; ids: of their prompts,
        for skipped.jsonl; tokens: prompts and responses as token ids, read from the rollout where not given, for which
        a GPU has to wait. In the first critic_warmup_steps steps only the critic learns. With target_kl the update
        ends, before the optimizer step that would follow (under DeepSpeed after it), once a minibatch shows 1.5 times
        that much KL to the rollout's policy.
        An optimizer step whose loss or gradient is not finite is left out, on all ranks alike; after
        max_skipped_updates of them in a row the run ends by a UserError.
        Returns sums over this rank and what was not left out (losses, already divided by global counts, and
        per-token statistics), each float64 [], under the names in SUMS, "tokens" that were summed over, this rank's
        "ratio_max", and, alike on all ranks, "grad_norm" and "grad_norm_critic" of the last update, the
        "minibatches" that were looked at, the "updates" done and those "skipped"; the counts are plain numbers.
        """
        self.model.train()
        sums = wide(torch.zeros(len(SUMS), device=rollout.ids.device))
        largest, norms, n_tokens = sums[0], sums[:2], 0
        minibatches = updates = skipped = 0
        self.passes = []
        policy_learns = step > self.args.critic_warmup_steps
        numbers = torch.stack([rollout.logp, rollout.values, targets.advantages, targets.returns]).flatten(1)
        width = rollout.mask.shape[1]
        tokens = tokens or token_rows(rollout.ids, rollout.attention, width)
        for batch in self._plan(tokens, positions, n_global, step, width):
            parts = self._passes(numbers, batch, policy_learns)
            self.passes += [one.rows for one in batch.passes]
            far = self._went_far(parts[:, SUMS.index("approxkl")].sum(), batch.n_tokens)
            held = far and not self.deepspeed
            found, done = (norms, False) if held else self._step(policy_learns, step)
            minibatches, updates = minibatches + 1, updates + done
            if done or held:
                sums, n_tokens, norms = sums + parts[:, :-1].sum(0), n_tokens + batch.n_local, found
                largest = torch.maximum(largest, parts[:, -1].max())
                self.skips.in_a_row = 0
            else:
                skipped += 1
                groups = [one.rows for one in batch.passes]
                self._left_out(step, update_rows(rollout, targets, groups, parts[:, :2], ids), found)
            if far:
                self.optimizer.zero_grad()
                break
        self.model.eval()
        return _result(sums, (minibatches, updates, skipped), n_tokens, largest, norms)

    def leave_out(self, step: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A PPO step whose rollout is not finite: it counts as one update left out. What `learn` returns, all 0.

        rows: of all ranks, those that are not finite, as `broken_rows` has them.
        """
        self.passes = []
        self.skips.report(step, sorted({what for row in rows for what in row["not_finite"]}), rows)
        zeros = wide(torch.zeros(len(SUMS), device=self.accelerator.device))
        return _result(zeros, (0, 0, 1), 0, zeros[0], zeros[:2])

    def _left_out(self, step: int, rows: list[dict[str, Any]], norms: Tensor) -> None:
        rows = all_rows(rows)
        lost = any(isinstance(row[name], str) for row in rows for name in ("policy_loss", "value_loss"))
        what = ["loss", "gradient"] if lost else ["gradient"]
        self.skips.report(step, what, rows, grad_norm=[json_number(norm) for norm in norms])

    def _went_far(self, approxkl: Tensor, n_tokens: int) -> bool:
        if self.args.target_kl is None:
            return False
        return bool(all_sum(self.accelerator, approxkl.reshape(1)) / n_tokens > 1.5 * self.args.target_kl)

    def _plan(
        self,
        tokens: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
        positions: Sequence[int],
        n_global: int,
        step: int,
        width: int,
    ) -> list[Minibatch]:
        """All optimizer steps of an update: which rows meet in which pass, and their texts on the device.

        Rows are dealt to minibatches by their place in the global batch, so that the number of ranks does not decide
        which rows meet in an optimizer step. Every rank makes the same number of passes: one that has run out of rows
        takes part with a row that counts for nothing. One collective for the whole update, none for one process.
        """
        prompts, responses = tokens
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        row_at = {position: row for row, position in enumerate(positions) if position >= 0}
        device, dealt = self.accelerator.device, self._deal(n_global, step)
        groups = [self._group([row_at[place] for place in members if place in row_at], lengths) for members in dealt]
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
        """The rows of the global batch in each minibatch, the same on all ranks."""
        dealt: list[list[int]] = []
        for epoch in range(self.args.num_ppo_epochs):
            generator = torch.Generator().manual_seed((self.args.seed * 1_000_003 + step) * 1_009 + epoch)
            order = torch.randperm(n_global, generator=generator)
            parts = order.tensor_split(min(self.args.num_mini_batches, n_global))
            dealt += [members.tolist() for members in parts]
        return dealt

    def _group(self, rows: list[int], lengths: Sequence[int]) -> list[list[int]]:
        """This rank's rows of a minibatch as passes. lengths: of all its texts."""
        most, budget = self.args.per_device_train_batch_size, self.args.micro_batch_tokens
        rows, kind = sorted(rows), self.accelerator.device.type
        packed = self.accelerator.unwrap_model(self.model).packs(max(lengths))
        near = passes_of([lengths[row] for row in rows], most, kind, budget, packed)
        return [[rows[i] for i in group] for group in near]

    def _accumulate(self, passes: list[Pass]) -> Iterator[Pass]:
        # Counted from 0 at each optimizer step, so that gradients are synchronised at its last micro-batch.
        self.accelerator.step = 0
        self.accelerator.gradient_accumulation_steps = len(passes)
        for one in passes:
            with self.accelerator.accumulate(self.model):
                yield one

    def _passes(self, numbers: Tensor, batch: Minibatch, policy_learns: bool) -> Tensor:
        """Forward and backward over one optimizer step's passes; float64 [passes, len(SUMS) + 1].

        The columns are SUMS and the largest ratio of a token.
        """
        parts = []
        with self._policy_rate(policy_learns):
            for one in self._accumulate(batch.passes):
                parts.append(self._backward(numbers, one, batch, float(policy_learns)))
                self.event("on_substep_end")
        return wide(torch.stack(parts))

    def _backward(self, numbers: Tensor, one: Pass, batch: Minibatch, policy: float) -> Tensor:
        """numbers: float [4, B * T], what the rollout and its targets say of each token. Nothing in here waits."""
        args, mask = self.args, one.counts
        old_logp, old_values, advantages, returns = numbers.index_select(1, one.texts.places)
        with self.accelerator.autocast():
            logp, entropy, values = self.model(one.texts)
        pg = policy_loss(logp, old_logp, advantages, mask, args.cliprange, batch.n_tokens)
        vf = value_loss(values, old_values, returns, mask, args.cliprange_value, batch.n_tokens)
        # The loss is divided by the global token count already. Accelerate divides by the micro-batches (DeepSpeed
        # does not) and the ranks' gradients are averaged: both are undone here, as in Accelerate's example
        # gradient_accumulation_for_autoregressive_models.py.
        scale = self.accelerator.num_processes * (1 if self.deepspeed else len(batch.passes))
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
            sums = torch.where(mask, torch.stack([x.float() for x in per_token]), 0).sum(1)
            return torch.cat([torch.stack([pg, vf]), sums, torch.where(mask, ratio, 0).amax(0, keepdim=True)])

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
                full_tensor(torch.nn.utils.clip_grad_norm_([p for p in part.parameters() if p.requires_grad], limit))
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
    sums: Tensor, counts: tuple[int, int, int], tokens: int, ratio_max: Tensor, norms: Tensor
) -> dict[str, Any]:
    result: dict[str, Any] = dict(zip(SUMS, sums.unbind(), strict=True))
    result |= {"tokens": tokens, "ratio_max": ratio_max, "grad_norm": norms[0], "grad_norm_critic": norms[1]}
    return result | dict(zip(("minibatches", "updates", "skipped"), map(float, counts), strict=True))


def update_rows(
    rollout: Rollout, targets: Targets, groups: Sequence[Sequence[int]], losses: Tensor, prompt_ids: Sequence[str]
) -> list[dict[str, Any]]:
    """This rank's rows of an optimizer step. losses: [len(groups), 2], policy and value, of each micro-batch."""
    rows = []
    for index, (policy, value) in zip(groups, losses.tolist(), strict=True):
        for i in index:
            aims = {"advantage": targets.advantages[i], "return": targets.returns[i]}
            largest = {name: json_number(x.abs().max()) for name, x in aims.items()}
            loss = {"policy_loss": json_number(policy), "value_loss": json_number(value)}  # of its micro-batch
            rows.append(facts(rollout, i, prompt_ids) | largest | loss)
    return rows
