"""Act: responses of the policy to a share of prompts, seen once by every role and every reward."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.models import unwrap_model_for_generation

from rlhf.config import PPOConfig
from rlhf.distributed.collectives import all_rows, all_sum, equal_share
from rlhf.distributed.launch import is_fsdp
from rlhf.distributed.sharding import gathered, is_sharded
from rlhf.errors import UserError
from rlhf.functional.batching import left_pad, passes_of, right_pad, to_device, to_device_together
from rlhf.generation.decode import generate
from rlhf.generation.sampling import uniforms
from rlhf.generation.static import StaticDecoder, cuda_graph
from rlhf.models.kernels.attention import packs
from rlhf.models.kernels.autocast_cache import frozen_cast
from rlhf.models.kernels.onednn_linear import Prepacked
from rlhf.models.sampling_copy import SamplingCopy, can_copy
from rlhf.models.token_logprobs import exact_kl, head_logits, in_chunks, logp_of, texts_of, token_rows, trunk_states
from rlhf.models.unwrap import Model, unwrap_peft
from rlhf.ppo.prompts import Prompt
from rlhf.ppo.roles import Roles
from rlhf.ppo.score_scaling import ScoreScaler
from rlhf.reward.reward_functions import (
    Completions,
    FunctionReward,
    RewardFunction,
    TextReward,
    TokenReward,
    weighted_sum,
)
from rlhf.tracking.skipped_updates import json_number


@dataclass(frozen=True)
class Rollout:
    """What the policy did, once; nothing downstream changes it. B samples, P prompt, T response tokens."""

    ids: Tensor  # int   [B, P+T] left-padded prompt, then right-padded response
    attention: Tensor  # bool  [B, P+T] True on real tokens
    mask: Tensor  # bool  [B, T]   True on response tokens, first EOS included
    ended: Tensor  # bool  [B]      False when cut
    real: Tensor  # bool  [B]      False on filler rows that only keep the ranks in step
    logp: Tensor  # float [B, T]   log pi_old(token), nats
    ref_logp: Tensor  # float [B, T]   log pi_ref(token), nats
    entropy: Tensor  # float [B, T]   of the policy's distribution, nats
    exact_kl: Tensor  # float [B, T]   KL(pi_old || pi_ref) over the whole vocabulary, nats
    values: Tensor  # float [B, T]   critic, reward units
    last_value: Tensor  # float [B]      critic after the last token, reward units
    scores: Tensor  # float [B, K]   one column a reward source, as it came; NaN is no opinion
    raw_score: Tensor  # float [B]      their weighted sum
    score: Tensor  # float [B]      what PPO learns from: raw_score scaled and clipped where asked for


def pack(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Token rows -> (ids int [B, P+T], attention bool [B, P+T], mask bool [B, T])."""
    prompt_ids, prompt_mask = left_pad(prompts, pad_id, device)
    response_ids, mask = right_pad(responses, pad_id, device)
    return torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, mask], 1), mask


@torch.no_grad()
def observe(
    roles: Roles,
    packed: tuple[Tensor, Tensor, Tensor],
    args: PPOConfig,
    note: Callable[[list[int]], None] = lambda rows: None,
    tokens: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]] | None = None,
) -> dict[str, Tensor]:
    """One pass of policy, critic and reference over finished texts, local_rollout_forward_batch_size at a time.

    packed: as `pack` makes them; tokens: the prompts and responses that it was given, read from the first two where
    they are not given here, for which a GPU has to wait. note: told the rows of each pass.
    Returns the fields of a Rollout that come from them, float32, zero off-mask.
    """
    ids, attention, mask = packed
    (count, width), device = mask.shape, ids.device
    prompts, responses = tokens or token_rows(ids, attention, width)
    names = ("logp", "ref_logp", "entropy", "exact_kl", "values")
    seen = torch.zeros(len(names), count * width, device=device)
    last_value = torch.zeros(count, device=device)
    policy = unwrap_peft(roles.trained.policy)

    def per_token(states: Tensor, ref_states: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        logits = head_logits(policy, states)
        with roles.reference.active() as model:
            ref_logits = head_logits(unwrap_peft(model), ref_states)
        logp, entropy = logp_of(logits, tokens, args.temperature)
        ref_logp, _ = logp_of(ref_logits, tokens, args.temperature)
        return logp, ref_logp, entropy, exact_kl(logits, ref_logits, args.temperature)

    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    longest = max(lengths)
    without_padding = roles.trained.packs(longest) and packs(roles.reference.model, longest)
    kind, budget = device.type, args.micro_batch_tokens
    groups = passes_of(lengths, args.local_rollout_forward_batch_size, kind, budget, without_padding)
    for group, texts in zip(groups, texts_of(prompts, responses, groups, width, device), strict=True):
        note(group)
        states, values = roles.trained.states_and_values(texts)
        with roles.reference.active() as model:
            ref_states = trunk_states(unwrap_peft(model), texts.ids, texts.lengths)
        inputs = texts.at_tokens(states), texts.at_tokens(ref_states), texts.tokens
        flat = in_chunks(per_token, policy.config.vocab_size, *inputs)
        seen.index_copy_(1, texts.places, torch.stack([*flat, texts.at_tokens(values)]))
        last_value.index_copy_(0, texts.rows, values.flatten().index_select(0, texts.last))
    return dict(zip(names, seen.view(len(names), count, width), strict=True)) | {"last_value": last_value}


def not_finite(rollout: Rollout) -> dict[str, Tensor]:
    """What learning would read -> bool [B], True on rows where it is not finite; never on filler rows."""

    def on_tokens(x: Tensor) -> Tensor:
        return (~x.isfinite() & rollout.mask).any(1)

    return {
        "score": ~rollout.raw_score.isfinite() & rollout.real,
        "log-prob": on_tokens(rollout.logp),
        "reference's log-prob": on_tokens(rollout.ref_logp),
        "value": on_tokens(rollout.values) | (~rollout.last_value.isfinite() & rollout.real),
    }


def set_aside(rollout: Rollout, rows: Tensor) -> Rollout:
    """The rollout with some rows, bool [B], counting for nothing, as filler rows do."""
    return replace(rollout, real=rollout.real & ~rows, mask=rollout.mask & ~rows.unsqueeze(1))


def broken_rows(
    rollout: Rollout, bad: dict[str, Tensor], prompt_ids: Sequence[str], rewards: Sequence[str]
) -> list[dict[str, Any]]:
    """This rank's rows of which something is not finite, with what that is and every reward's score."""
    rows = []
    for i in torch.stack(list(bad.values())).any(0).nonzero().flatten().tolist():
        scores = dict(zip(rewards, map(json_number, rollout.scores[i]), strict=True))
        what = [name for name, where in bad.items() if where[i]]
        rows.append(facts(rollout, i, prompt_ids) | {"not_finite": what, "scores": scores})
    return rows


def facts(rollout: Rollout, i: int, prompt_ids: Sequence[str]) -> dict[str, Any]:
    """A row's prompt id, lengths and numbers; log-probs are sums over the response, nats. No texts."""
    mask = rollout.mask[i]
    width = rollout.attention.shape[1] - mask.shape[0]
    return {
        "prompt_id": prompt_ids[i] if prompt_ids else str(i),
        "prompt_tokens": int(rollout.attention[i, :width].sum()),
        "response_tokens": int(mask.sum()),
        "score": json_number(rollout.raw_score[i]),
        "logp": json_number(rollout.logp[i][mask].sum()),
        "ref_logp": json_number(rollout.ref_logp[i][mask].sum()),
        "values": json_number(rollout.values[i][mask].sum()),
    }


_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Experience:
    """This rank's share of a step: B prompts, their responses, and what every role makes of them."""

    prompts: list[Prompt]
    responses: list[list[int]]
    rollout: Rollout
    n_global: int  # responses over all ranks, filler rows not counted
    rewards: list[str]  # name of each column of rollout.scores
    broken: list[dict[str, Any]]  # rows of all ranks with numbers that are not finite: nothing is learned from the step


def captures(args: PPOConfig, device: torch.device, gathers: bool) -> bool:
    """Whether decoding is captured as CUDA graphs; a UserError where that is asked for and cannot be.

    gathers: whether the engine gathers weights for each rollout.
    """
    why = "the device is not CUDA" if device.type != "cuda" else "the engine gathers weights for each rollout"
    can = device.type == "cuda" and not gathers
    if args.cuda_graphs and not can:
        raise UserError(f"cuda_graphs: leave it unset or set it to false: {why}")
    return can and args.cuda_graphs is not False


class Actor:
    """Samples responses and looks at them. All calls are made by all ranks, with equally many rows."""

    def __init__(
        self,
        args: PPOConfig,
        roles: Roles,
        rewards: Sequence[RewardFunction],
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
        self._copy: SamplingCopy | None = None
        # Weights that an engine gathers for each rollout do not stay where they are.
        self._gathers = is_sharded(roles.trained) or is_fsdp(accelerator)
        self._decoder = StaticDecoder(cuda_graph() if captures(args, accelerator.device, self._gathers) else None)
        # What went through the models last: rows and columns of each call that sampled; rows of each pass over
        # finished texts, and the sources that were asked about them.
        self.decoded: list[tuple[int, int]] = []
        self.observed: list[list[int]] = []
        self.asked: Sequence[RewardFunction] = []

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Where an engine shards weights, every role's gathered once for all that is done inside; no gradients. Nests.

        Inside they are plain tensors: forward passes make no collective, so ranks may make different numbers of them.
        Under FSDP2 roles that have a model of their own are whole always.
        """
        if self._is_whole or not self._gathers:
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
    def fast_frozen_layers(self, *frozen: Model) -> Iterator[None]:
        """Frozen layers as they compute fastest: see `Prepacked` for a CPU; elsewhere cast once, not in each pass.

        Those of what is trained, and of these models, which are never. On a CPU with adapters only: in full fine-tuning
        the reference would then round otherwise than a policy of the same weights.
        """
        models, device = [self.roles.trained, *frozen], self.accelerator.device
        if device.type != "cpu" and not self._gathers:
            with frozen_cast(*models, dtype=_AUTOCAST.get(self.accelerator.mixed_precision)):
                yield
            return
        with self._prepacked.active(*(models if isinstance(self.roles.trained.policy, PeftModel) else [])):
            yield

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with self.whole(), self.fast_frozen_layers(*self._frozen()), self.accelerator.autocast():
            yield

    def sample(
        self, prompts: Sequence[Prompt], step: int, temperature: float | None = None, model: Any = None
    ) -> list[list[int]]:
        """A response for each prompt, from its own random stream of this step."""
        args = self.args
        self.roles.trained.eval()
        u = uniforms(args.seed, step, [prompt.prompt_id for prompt in prompts], args.response_length)
        self.decoded = []
        with self.whole():
            # Refreshed before frozen weights are cast: adapters are added to them as they are.
            twin = self._sampling_copy() if model is None else None
            as_is = nullcontext() if twin is not None else self.fast_frozen_layers(*self._frozen())
            with as_is, self.accelerator.autocast():
                return generate(
                    twin or model or self.roles.trained.policy,
                    [prompt.input_ids for prompt in prompts],
                    u,
                    self.eos_ids,
                    temperature or args.temperature,
                    lambda *shape: self.decoded.append(shape),
                    # Its graphs read weights that stay where they are, as the copy's do.
                    None if twin is None else self._decoder,
                )

    def _sampling_copy(self) -> Any:
        """The copy of the policy that a GPU samples from; None where there is none."""
        policy = self.roles.trained.policy
        if self.accelerator.device.type == "cpu" or self._gathers or not can_copy(policy):
            return None
        if self._copy is None:
            self._copy = SamplingCopy(policy, _AUTOCAST.get(self.accelerator.mixed_precision))
        self._copy.refresh()
        return self._copy.model

    def ended(self, responses: Sequence[Sequence[int]]) -> list[bool]:
        """Which responses end with an EOS; the others were cut."""
        return [len(row) > 0 and row[-1] in self.eos_ids for row in responses]

    def score(self, prompts: Sequence[Prompt], responses: list[list[int]], real: Tensor) -> Tensor:
        """What each reward source says: float32 [B, K], NaN for no opinion. real: bool [B], on the CPU."""
        everyone, device = list(range(len(prompts))), self.accelerator.device
        columns = []
        for source in self.rewards:
            # Models keep the ranks in step, filler rows included; functions see what is real only.
            rows = [i for i in everyone if real[i]] if isinstance(source, FunctionReward) else everyone
            said = source(self._finished(prompts, responses, rows)) if rows else torch.zeros(0)
            if len(rows) < len(prompts):
                said = torch.zeros(len(prompts)).index_copy_(0, torch.tensor(rows, dtype=torch.long), said)
            columns.append(to_device(said, device) if said.device.type == "cpu" else said)
        return torch.stack(columns, dim=1)

    def rollout(
        self,
        prompts: Sequence[Prompt],
        responses: list[list[int]],
        real: Tensor,
        scores: Tensor | None = None,
    ) -> Rollout:
        """Everything PPO needs to know about finished responses, with scores as they came; see `experience`.

        real: bool [B], on the CPU, False on filler rows. scores: float [B, K], from outside, NaN for no opinion; not
        given, the reward sources are asked.
        """
        self.roles.trained.eval()
        device = self.accelerator.device
        prompt_ids = [prompt.input_ids for prompt in prompts]
        padded = pack(prompt_ids, responses, self.eos_ids[0], torch.device("cpu"))
        ended = torch.tensor(self.ended(responses))
        ids, attention, mask, ended, real_there = to_device_together([*padded, ended, real], device)
        with self._computing():
            self.observed, self.asked = [], self.rewards if scores is None else []
            packed, tokens = (ids, attention, mask), (prompt_ids, responses)
            seen = observe(self.roles, packed, self.args, self.observed.append, tokens)
            weights, abstains = self.weights, self.abstains
            if scores is None:
                scores = self.score(prompts, responses, real)
            else:
                weights = torch.ones(scores.shape[1], device=device)
                abstains = weights.bool()
        raw = weighted_sum(scores, weights, abstains)
        mask = mask & real_there.unsqueeze(1)  # filler rows count for nothing from here on
        return Rollout(ids, attention, mask, ended, real_there, scores=scores, raw_score=raw, score=raw, **seen)

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
                raw.append(weighted_sum(scores, self.weights, self.abstains))
        m = self.scaler.fit(torch.cat(raw), real.to(raw[0].device), lambda x: all_sum(self.accelerator, x))
        mean, std = m.mean.item(), m.std.item()
        if not math.isfinite(mean + std):
            raise UserError(f"score_norm_samples: expected finite scores, found mean {mean} and deviation {std}")
        return mean, std

    def _finished(self, prompts: Sequence[Prompt], responses: list[list[int]], rows: list[int]) -> Completions:
        part = [responses[i] for i in rows]
        return Completions(
            prompts=[prompts[i].content for i in rows],
            prompt_ids=[prompts[i].input_ids for i in rows],
            response_ids=part,
            ended=self.ended(part),
            columns=[prompts[i].columns for i in rows],
        )
