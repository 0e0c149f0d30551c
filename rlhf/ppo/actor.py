"""Act: responses of the policy to a share of prompts, seen once by every role and every reward."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.models import unwrap_model_for_generation

from rlhf.config import PPOConfig
from rlhf.errors import UserError
from rlhf.generation.engine import generate
from rlhf.generation.sampling import uniforms
from rlhf.models.actor_critic import Model
from rlhf.models.prepacked import Prepacked
from rlhf.ppo.prompts import Prompt
from rlhf.ppo.roles import Roles
from rlhf.ppo.rollout import Rollout, observe, pack
from rlhf.ppo.score_scaling import ScoreScaler
from rlhf.ppo.skipped import broken_rows, not_finite, set_aside
from rlhf.reward.sources import Finished, FunctionReward, RewardSource, TextReward, TokenReward, weighted
from rlhf.runtime.distributed import all_rows, all_sum, equal_share
from rlhf.runtime.engine import gathered, is_fsdp, is_sharded


@dataclass(frozen=True)
class Experience:
    """This rank's share of a step: B prompts, their responses, and what every role makes of them."""

    prompts: list[Prompt]
    responses: list[list[int]]
    rollout: Rollout
    n_global: int  # responses over all ranks, filler rows not counted
    rewards: list[str]  # name of each column of rollout.scores
    broken: list[dict[str, Any]]  # rows of all ranks with numbers that are not finite: nothing is learned from the step


class Actor:
    """Samples responses and looks at them. All calls are made by all ranks, with equally many rows."""

    def __init__(
        self,
        args: PPOConfig,
        roles: Roles,
        rewards: Sequence[RewardSource],
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: list[int],
        accelerator: Accelerator,
        engine: Any,
    ) -> None:
        """engine: roles.trained as Accelerate has prepared it."""
        self.args, self.roles, self.rewards = args, roles, rewards
        self.tokenizer, self.eos_ids, self.accelerator = tokenizer, eos_ids, accelerator
        self.weights = torch.tensor(args.reward_weights or [1.0] * len(rewards), device=accelerator.device)
        functions = [isinstance(source, FunctionReward) for source in rewards]
        self.abstains = torch.tensor(functions, dtype=torch.bool, device=accelerator.device)
        self.scaler = ScoreScaler(args)
        self.engine, self._is_whole = engine, False
        self._prepacked = Prepacked()
        # What went through the models last: rows and columns of each call that sampled; rows of each pass over
        # finished texts, and the sources that were asked about them.
        self.decoded: list[tuple[int, int]] = []
        self.observed: list[Tensor] = []
        self.asked: Sequence[RewardSource] = []

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Where an engine shards weights, every role's gathered once for all that is done inside; no gradients. Nests.

        Inside they are plain tensors: forward passes make no collective, so ranks may make different numbers of them.
        Under FSDP2 roles that have a model of their own are whole always.
        """
        if self._is_whole or not (is_sharded(self.roles.trained) or is_fsdp(self.accelerator)):
            yield
            return
        if is_fsdp(self.accelerator):
            self._is_whole = True
            try:
                with torch.no_grad(), gathered([self.roles.trained]):
                    yield
            finally:
                self._is_whole = False
            return
        frozen = self._frozen()
        trained = {id(p) for p in self.roles.trained.parameters()}
        own = [m for m in frozen if not any(id(p) in trained for p in m.parameters())]
        self._is_whole = True
        try:
            with torch.no_grad(), gathered(own), unwrap_model_for_generation(self.engine, self.accelerator):
                yield
        finally:
            self._is_whole = False

    def _frozen(self) -> list[Model]:
        roles = [role for role in (self.roles.reference, self.roles.reward) if role is not None]
        roles += [source.role for source in self.rewards if isinstance(source, TokenReward | TextReward)]
        return [role.model for role in roles]

    @contextmanager
    def prepacked(self) -> Iterator[None]:
        """With adapters on a CPU, all frozen layers compute by layouts that are kept from step to step.

        Not so in full fine-tuning: the reference would then round otherwise than a policy of the same weights.
        """
        models = [self.roles.trained, *self._frozen()] if isinstance(self.roles.trained.policy, PeftModel) else []
        with self._prepacked.active(*models):
            yield

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with self.whole(), self.prepacked(), self.accelerator.autocast():
            yield

    def sample(
        self, prompts: Sequence[Prompt], step: int, temperature: float | None = None, model: Any = None
    ) -> list[list[int]]:
        """A response for each prompt, from its own random stream of this step."""
        args = self.args
        self.roles.trained.eval()
        u = uniforms(args.seed, step, [prompt.prompt_id for prompt in prompts], args.response_length)
        with self._computing():
            ids = [prompt.input_ids for prompt in prompts]
            self.decoded = []
            return generate(
                model or self.roles.trained.policy,
                ids,
                u,
                self.eos_ids,
                temperature or args.temperature,
                lambda *shape: self.decoded.append(shape),
            )

    def ended(self, responses: Sequence[Sequence[int]]) -> list[bool]:
        """Which responses end with an EOS; the others were cut."""
        return [len(row) > 0 and row[-1] in self.eos_ids for row in responses]

    def score(self, prompts: Sequence[Prompt], responses: list[list[int]], real: Tensor) -> Tensor:
        """What each reward source says: float32 [B, K], NaN for no opinion."""
        everyone = list(range(len(prompts)))
        columns = []
        for source in self.rewards:
            # Models keep the ranks in step, filler rows included; functions see what is real only.
            rows = [i for i in everyone if real[i]] if isinstance(source, FunctionReward) else everyone
            column = torch.zeros(len(prompts))
            if rows:
                column[rows] = source(self._finished(prompts, responses, rows))
            columns.append(column)
        return torch.stack(columns, dim=1).to(self.accelerator.device)

    def rollout(
        self,
        prompts: Sequence[Prompt],
        responses: list[list[int]],
        real: Tensor,
        scores: Tensor | None = None,
    ) -> Rollout:
        """Everything PPO needs to know about finished responses, with scores as they came; see `experience`.

        real: bool [B], False on filler rows. scores: float [B, K], from outside, NaN for no opinion; not given,
        the reward sources are asked.
        """
        self.roles.trained.eval()
        device = self.accelerator.device
        real = real.to(device)
        packed = pack([prompt.input_ids for prompt in prompts], responses, self.eos_ids[0], device)
        with self._computing():
            self.observed, self.asked = [], self.rewards if scores is None else []
            seen = observe(self.roles, packed, self.args, self.observed.append)
            weights, abstains = self.weights, self.abstains
            if scores is None:
                scores = self.score(prompts, responses, real)
            else:
                weights = torch.ones(scores.shape[1], device=device)
                abstains = weights.bool()
        raw = weighted(scores, weights, abstains)
        ids, attention, mask = packed
        ended = torch.tensor(self.ended(responses), device=device)
        mask = mask & real.unsqueeze(1)  # filler rows count for nothing from here on
        return Rollout(ids, attention, mask, ended, real, scores=scores, raw_score=raw, score=raw, **seen)

    def experience(
        self, prompts: list[Prompt], responses: list[list[int]], rollout: Rollout, n_global: int, rewards: list[str]
    ) -> Experience:
        """What a step learns from: scores scaled, or rows whose numbers are not finite set aside on all ranks."""
        bad = not_finite(rollout)
        rows = torch.stack(list(bad.values())).any(0)
        broken: list[dict[str, Any]] = []
        if all_sum(self.accelerator, rows.sum().reshape(1)) > 0:
            broken = all_rows(broken_rows(rollout, bad, [prompt.prompt_id for prompt in prompts], rewards))
            rollout = set_aside(rollout, rows)
        else:  # the running moments of the scores would keep what is not finite for ever
            score = self.scaler(rollout.raw_score, rollout.real, lambda x: all_sum(self.accelerator, x))
            rollout = replace(rollout, score=score)
        return Experience(prompts, responses, rollout, n_global, rewards, broken)

    @torch.no_grad()
    def fit_scores(self, prompts: Sequence[Prompt]) -> tuple[float, float]:
        """Bring scores to mean 0 and standard deviation 1 on the reference's responses; returns what they were."""
        mine, real = equal_share(prompts, self.accelerator)
        raw, size = [], self.args.local_batch_size
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            with self.roles.reference.active() as model:
                responses = self.sample(part, 0, model=model)
            with self._computing():
                scores = self.score(part, responses, real[start : start + size])
                raw.append(weighted(scores, self.weights, self.abstains))
        m = self.scaler.fit(torch.cat(raw), real.to(raw[0].device), lambda x: all_sum(self.accelerator, x))
        mean, std = m.mean.item(), m.std.item()
        if not math.isfinite(mean + std):
            raise UserError(f"score_norm_samples: expected finite scores, found mean {mean} and deviation {std}")
        return mean, std

    def _finished(self, prompts: Sequence[Prompt], responses: list[list[int]], rows: list[int]) -> Finished:
        part = [responses[i] for i in rows]
        return Finished(
            prompts=[prompts[i].content for i in rows],
            prompt_ids=[prompts[i].input_ids for i in rows],
            response_ids=part,
            ended=self.ended(part),
            columns=[prompts[i].columns for i in rows],
        )
