"""Collect: the policy answers prompts; then every role and every reward reads the finished texts once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.models import unwrap_model_for_generation

from rlhf.config import PPOConfig
from rlhf.data.chat import decode_response
from rlhf.distributed.collectives import Shard, all_rows, all_sum
from rlhf.distributed.launch import autocast_dtype, is_fsdp
from rlhf.distributed.sharding import gathered, is_sharded
from rlhf.errors import UserError
from rlhf.file_types import SkippedRow
from rlhf.functional.batching import left_pad, passes_of, right_pad, to_device, to_device_together
from rlhf.generation.decode import Samples, decode, uniforms
from rlhf.generation.static import StaticDecoder, cuda_graph
from rlhf.generation.vllm import VLLMSampler
from rlhf.models.actor_critic import read_texts, texts_of
from rlhf.models.kernels.attention import packs
from rlhf.models.kernels.autocast_cache import frozen_cast
from rlhf.models.sampling_copy import SamplingCopy, can_copy
from rlhf.models.unwrap import Model
from rlhf.perf.work import TextPasses
from rlhf.ppo.prompts import Prompt, stops_at_text
from rlhf.ppo.roles import Roles
from rlhf.ppo.self_check import check_models
from rlhf.reward.calls import Logged
from rlhf.reward.reward_functions import Completions, FunctionReward, Reward, said, weighted_sum
from rlhf.tracking.skipped_updates import json_number


@dataclass(frozen=True)
class Rollout:
    """What one rank knows of a batch of responses, made once; nothing downstream changes it.

    B rows, P prompt tokens, T response tokens, K rewards. Rows with a number that is not finite count for nothing, as
    padding rows do: mask and is_valid are False there.
    """

    ids: Tensor  # int   [B, P+T] left-padded prompt, then right-padded response
    attention: Tensor  # bool  [B, P+T] True on tokens, False on padding
    mask: Tensor  # bool  [B, T]   True on response tokens, first EOS included
    ended: Tensor  # bool  [B]      True with an EOS, False when truncated
    is_valid: Tensor  # bool  [B]      False on padding rows, which keep the ranks in step
    logp: Tensor  # float [B, T]   log pi_old(token), nats
    ref_logp: Tensor  # float [B, T]   log pi_ref(token), nats
    entropy: Tensor  # float [B, T]   of the policy's distribution, nats
    exact_kl: Tensor  # float [B, T]   KL(pi_old || pi_ref) over the whole vocabulary, nats
    values: Tensor  # float [B, T]   critic, reward units
    last_value: Tensor  # float [B]      critic after the last token, reward units
    scores: Tensor  # float [B, K]   one column per reward, as it returned them; NaN is a function's None
    raw_score: Tensor  # float [B]      their weighted sum
    prompts: list[Prompt]
    responses: list[list[int]]  # token ids, first EOS included
    shard: Shard  # which responses of the global batch these rows are
    reward_names: list[str]  # of the columns of scores
    nonfinite: Mapping[str, Tensor] = field(default_factory=dict)  # what -> bool [B], True where it is not finite
    calls: list[tuple[int, int]] = field(default_factory=list)  # rows and columns of each call that sampled
    passes: list[list[int]] = field(default_factory=list)  # rows of each pass over the finished texts
    reward_passes: Mapping[str, TextPasses] = field(default_factory=dict)  # by reward model
    logged: Logged = field(default_factory=Logged)  # by reward functions


def use_cuda_graphs(args: PPOConfig, device: torch.device, gathers: bool) -> bool:
    """Whether decoding is captured as CUDA graphs; a UserError if that was asked for and cannot be.

    gathers: whether the engine gathers weights for each rollout.
    """
    why = "the device is not CUDA" if device.type != "cuda" else "the engine gathers weights for each rollout"
    can = device.type == "cuda" and not gathers
    if args.cuda_graphs and not can:
        raise UserError(f"cuda_graphs: leave it unset or set it to false: {why}")
    return can and args.cuda_graphs is not False


class Scores(NamedTuple):
    """What the rewards returned, and what the reward models read for it."""

    scores: Tensor  # float32 [B, K], NaN for a function's None
    passes: dict[str, TextPasses]  # by reward model
    logged: Logged  # by functions


class RolloutCollector:
    """Samples responses and makes rollouts of them. All ranks make the same calls, with equally many rows."""

    def __init__(
        self,
        args: PPOConfig,
        roles: Roles,
        rewards: Sequence[Reward],
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: list[int],
        accelerator: Accelerator,
        wrapped_model: Any,
    ) -> None:
        """wrapped_model: roles.trained as Accelerate has prepared it."""
        self.args, self.roles, self.rewards = args, roles, rewards
        self.tokenizer, self.eos_ids, self.accelerator = tokenizer, eos_ids, accelerator
        self.wrapped_model, self.device = wrapped_model, accelerator.device
        self.end_is_text = stops_at_text(args, roles.trained.policy, tokenizer)
        self.weights = torch.tensor(args.reward_weights or [1.0] * len(rewards), device=self.device)
        functions = [isinstance(reward, FunctionReward) for reward in rewards]
        self.abstains = torch.tensor(functions, dtype=torch.bool, device=self.device)
        frozen = [roles.reference, roles.reward, *(getattr(reward, "role", None) for reward in rewards)]
        self.frozen: list[Model] = [role.model for role in frozen if role is not None]
        # Weights that an engine gathers for each rollout do not stay where they are.
        self._gathers = is_sharded(roles.trained) or is_fsdp(accelerator)
        self._is_gathered = False
        self._autocast_dtype = autocast_dtype(accelerator)
        self._decoder = StaticDecoder(cuda_graph() if use_cuda_graphs(args, self.device, self._gathers) else None)
        self._samples_from_copy = self.device.type != "cpu" and not self._gathers and can_copy(roles.trained.policy)
        self._copy: SamplingCopy | None = None
        trained = roles.trained
        self._vllm = (
            VLLMSampler(args, trained.policy, tokenizer, eos_ids, trained.suppress_tokens, accelerator)
            if args.use_vllm
            else None
        )
        with self.gathered_params(), accelerator.autocast():
            check_models(roles.trained, roles.reference)

    def sample(
        self, prompts: Sequence[Prompt], step: int, temperature: float | None = None, model: Any = None
    ) -> Samples:
        """A response to each prompt, from the policy or from model, which has no PEFT one around it.

        Each prompt has its own random stream per step, but not in vLLM, which samples from the policy if use_vllm says
        so; then weights must not be gathered.
        """
        args = self.args
        self.roles.trained.eval()
        if self._vllm is not None and model is None:
            return self._vllm.sample([prompt.input_ids for prompt in prompts], temperature or args.temperature)
        u = uniforms(args.seed, step, [prompt.stream for prompt in prompts], args.response_length)
        copy = self._refreshed_copy() if model is None and self._samples_from_copy else None
        # A copy has been cast, with adapters added to the weights as they are.
        frozen = nullcontext() if copy is not None else self.cast_frozen_layers()
        with self.gathered_params(), frozen, self.accelerator.autocast():
            return decode(
                copy or model or self.roles.trained.policy_base,
                [prompt.input_ids for prompt in prompts],
                u,
                self.eos_ids,
                temperature or args.temperature,
                # Its graphs read weights that stay where they are, as the copy's do.
                None if copy is None else self._decoder,
                self.roles.trained.suppress_tokens,
            )

    def complete(
        self,
        prompts: list[Prompt],
        samples: Samples,
        shard: Shard,
        is_valid: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> Rollout:
        """Everything that PPO needs to know about finished responses.

        is_valid: bool [B], on the CPU, if the rows are only a part of the shard's. scores: float [B, K] from outside;
        without them the rewards are asked.
        """
        self.roles.trained.eval()
        is_valid = shard.is_valid if is_valid is None else is_valid
        prompt_ids, responses = [prompt.input_ids for prompt in prompts], samples.responses
        padded = pad_batch(prompt_ids, responses, self.eos_ids[0])
        on_host = [*padded, torch.tensor(self.ended(responses)), is_valid]
        ids, attention, mask, ended, valid = to_device_together(on_host, self.device)
        names, weights, abstains = [reward.name for reward in self.rewards], self.weights, self.abstains
        with self._computing():
            seen, passes = compute_logprobs_and_values(self.roles, prompt_ids, responses, self.args, self.device)
            if scores is None:
                scored = self.score(prompts, responses, is_valid)
            else:
                names, weights = ["score"], torch.ones(scores.shape[1], device=self.device)
                scored, abstains = Scores(scores, {}, Logged()), weights.bool()
        raw_score = weighted_sum(scored.scores, weights, abstains)
        mask = mask & valid.unsqueeze(1)
        nonfinite = find_nonfinite(raw_score, seen, mask, valid)
        keep = ~torch.stack(list(nonfinite.values())).any(0)
        return Rollout(
            ids,
            attention,
            mask & keep.unsqueeze(1),
            ended,
            valid & keep,
            **seen,
            scores=scored.scores,
            raw_score=raw_score,
            prompts=prompts,
            responses=responses,
            shard=shard,
            reward_names=names,
            nonfinite=nonfinite,
            calls=samples.calls,
            passes=passes,
            reward_passes=scored.passes,
            logged=scored.logged,
        )

    def score(self, prompts: Sequence[Prompt], responses: list[list[int]], is_valid: Tensor) -> Scores:
        """Ask every reward; async functions answer while models score. is_valid: bool [B], on the CPU."""
        logged, asked = Logged(), {}
        functions = [reward for reward in self.rewards if isinstance(reward, FunctionReward)]
        rows = [i for i, valid in enumerate(is_valid.tolist()) if valid]
        if functions and rows:  # they see no others
            part = self._completions(prompts, responses, rows)
            asked = {function.name: function.ask(part, logged) for function in functions}
        found: dict[str, Tensor] = {}
        passes: dict[str, TextPasses] = {}
        for reward in self.rewards:
            if not isinstance(reward, FunctionReward):  # models keep the ranks in step, so they see padding rows, too
                passes[reward.name] = reward.plan(self._completions(prompts, responses, range(len(prompts))))
                found[reward.name] = reward.score(passes[reward.name])
        for function in functions:
            column = torch.zeros(len(prompts))
            if rows:
                column[rows] = asked[function.name]()
            found[function.name] = to_device(column, self.device)
        return Scores(torch.stack([found[reward.name] for reward in self.rewards], dim=1), passes, logged)

    def ended(self, responses: Sequence[Sequence[int]]) -> list[bool]:
        """Which responses end with an EOS; the others are truncated."""
        return [len(row) > 0 and row[-1] in self.eos_ids for row in responses]

    def text(self, response: list[int]) -> str:
        """A response for readers, without what ended it."""
        return decode_response(self.tokenizer, said([response], self.ended([response]), self.end_is_text)[0])

    @torch.no_grad()
    def score_reference(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Scores of the reference's responses: float [B], and bool [B], False on padding rows."""
        shard = Shard.of_rank(len(prompts), self.accelerator)
        mine, is_valid = shard.of(prompts), shard.is_valid
        raw, size = [], self.args.local_batch_size
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            with self.roles.reference.active():
                responses = self.sample(part, 0, model=self.roles.reference.base).responses
            with self._computing():
                scores = self.score(part, responses, is_valid[start : start + size]).scores
                raw.append(weighted_sum(scores, self.weights, self.abstains))
        return torch.cat(raw), is_valid.to(self.device)

    def _completions(self, prompts: Sequence[Prompt], responses: list[list[int]], rows: Sequence[int]) -> Completions:
        part = [responses[i] for i in rows]
        return Completions(
            prompts=[prompts[i].content for i in rows],
            prompt_ids=[prompts[i].input_ids for i in rows],
            response_ids=part,
            ended=self.ended(part),
            columns=[prompts[i].columns for i in rows],
            options=[prompts[i].options for i in rows],
            end_is_text=self.end_is_text,
        )

    @contextmanager
    def gathered_params(self) -> Iterator[None]:
        """If an engine shards weights: every role's are gathered once for all that is done inside. No gradients. Nests.

        Inside they are plain tensors: forward passes make no collective, so ranks may make different numbers of them.
        Under FSDP2, roles that have their own model are never sharded.
        """
        if self._is_gathered or not self._gathers:
            yield
            return
        self._is_gathered = True
        try:
            if is_fsdp(self.accelerator):
                with torch.no_grad(), gathered([self.roles.trained]):
                    yield
                return
            trained = {id(p) for p in self.roles.trained.parameters()}
            own = [m for m in self.frozen if not any(id(p) in trained for p in m.parameters())]
            unwrapped = unwrap_model_for_generation(self.wrapped_model, self.accelerator)
            with torch.no_grad(), gathered(own), unwrapped:
                yield
        finally:
            self._is_gathered = False

    @contextmanager
    def cast_frozen_layers(self, *frozen: Model) -> Iterator[None]:
        """Inside, frozen layers of what is trained, and of the models given, are cast once, not in each pass."""
        if self._autocast_dtype is None or self._gathers:
            yield
            return
        with frozen_cast(self.roles.trained, *frozen, dtype=self._autocast_dtype):
            yield

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with self.gathered_params(), self.cast_frozen_layers(*self.frozen), self.accelerator.autocast():
            yield

    def _refreshed_copy(self) -> Any:
        """The copy of the policy that a GPU samples from."""
        if self._copy is None:
            self._copy = SamplingCopy(self.roles.trained.policy, self._autocast_dtype)
        self._copy.refresh()
        return self._copy.model


def pad_batch(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Token rows -> (ids int [B, P+T], attention bool [B, P+T], mask bool [B, T]), on the CPU."""
    prompt_ids, prompt_mask = left_pad(prompts, pad_id)
    response_ids, mask = right_pad(responses, pad_id)
    return torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, mask], 1), mask


@torch.no_grad()
def compute_logprobs_and_values(
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    args: PPOConfig,
    device: torch.device,
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """One pass of policy, critic and reference over finished texts, local_rollout_forward_batch_size rows at a time.

    prompts, responses: token ids of B rows; T is the longest response. Returns the fields of a Rollout that come from
    these passes (logp, ref_logp, entropy, exact_kl, values: float32 [B, T], zero off the response; last_value: [B]),
    and the rows of each pass.
    """
    count, width = len(responses), max(map(len, responses))
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    longest = max(lengths)
    no_padding = roles.trained.packs(longest) and packs(roles.reference.base, longest)
    size, budget = args.local_rollout_forward_batch_size, args.micro_batch_tokens
    passes = passes_of(lengths, size, device.type, budget, no_padding)
    names = ("logp", "ref_logp", "entropy", "exact_kl", "values")
    seen = torch.zeros(len(names), count * width, device=device)
    last_value = torch.zeros(count, device=device)
    for texts in texts_of(prompts, responses, passes, width, device):
        per_token, last = read_texts(roles.trained, roles.reference, texts, args.temperature)
        seen.index_copy_(1, texts.places, per_token)
        last_value.index_copy_(0, texts.rows, last)
    fields = dict(zip(names, seen.view(len(names), count, width), strict=True))
    return fields | {"last_value": last_value}, passes


def find_nonfinite(raw_score: Tensor, seen: Mapping[str, Tensor], mask: Tensor, is_valid: Tensor) -> dict[str, Tensor]:
    """What learning would read -> bool [B], True on rows where it is not finite; False on padding rows."""

    def on_tokens(x: Tensor) -> Tensor:
        return (~x.isfinite() & mask).any(1)

    return {
        "score": ~raw_score.isfinite() & is_valid,
        "log-prob": on_tokens(seen["logp"]),
        "reference's log-prob": on_tokens(seen["ref_logp"]),
        "value": on_tokens(seen["values"]) | (~seen["last_value"].isfinite() & is_valid),
    }


def nonfinite_rows(rollout: Rollout, accelerator: Accelerator) -> list[SkippedRow]:
    """Rows of all ranks with a number that is not finite: which number, and every reward's score. One collective."""
    bad = torch.stack(list(rollout.nonfinite.values())).any(0)
    if not all_sum(accelerator, bad.sum().reshape(1)) > 0:
        return []
    rows: list[SkippedRow] = []
    for i in bad.nonzero().flatten().tolist():
        scores = dict(zip(rollout.reward_names, map(json_number, rollout.scores[i]), strict=True))
        what = [name for name, where in rollout.nonfinite.items() if where[i]]
        rows.append({**row_facts(rollout, i), "not_finite": what, "scores": scores})
    return all_rows(rows)


def row_facts(rollout: Rollout, i: int) -> SkippedRow:
    """What skipped.jsonl says of a row: id, lengths, numbers; log-probs are sums over the response, nats. No texts."""
    width = rollout.mask.shape[1]
    mask = rollout.attention[i, -width:]
    return {
        "prompt_id": rollout.prompts[i].prompt_id if rollout.prompts else str(i),
        "prompt_tokens": int(rollout.attention[i, :-width].sum()),
        "response_tokens": int(mask.sum()),
        "score": json_number(rollout.raw_score[i]),
        "logp": json_number(rollout.logp[i][mask].sum()),
        "ref_logp": json_number(rollout.ref_logp[i][mask].sum()),
        "values": json_number(rollout.values[i][mask].sum()),
    }
