"""What PPO's models compute for response tokens: log-probs, entropies and values, for no other position.

`ActorCritic` is what is trained, `FrozenRole` what it is measured by; below them are the states and logits that both
are made of.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from rlhf.distributed.sharding import is_sharded
from rlhf.errors import UserError
from rlhf.functional.batching import to_device
from rlhf.models.adapters import copy_of_config
from rlhf.models.kernels.attention import Packed, pack, packs
from rlhf.models.kernels.unmasked import unmasked
from rlhf.models.unwrap import Model, is_quantised, unwrap_peft

_MOST_LOGITS = 2**26  # numbers held at once: 256 MiB in float32
_NEVER = -1e4  # a logit of probability 0, in every precision
_REFERENCE = "reference"  # the adapter that keeps a policy's first adapter as it was


@dataclass(frozen=True)
class Texts:
    """B prompts with their responses, padded on the right: causal attention then needs no mask.

    N counts their response tokens, row by row. Which is where is planned on the host and copied to the device once for
    many passes, so that no pass waits for the host.
    """

    ids: Tensor  # int [B, L]
    lengths: Tensor  # int [B] tokens of prompt and response
    before: Tensor  # int [N] in [B * L]: the position whose state predicts the token
    tokens: Tensor  # int [N]: the token itself
    last: Tensor  # int [B] in [B * L]: the last token of the text
    places: Tensor  # int [N]: the token in the grid [rows, T] that the rows were taken from
    rows: Tensor  # int [B]: the rows of that grid

    def at_tokens(self, per_position: Tensor) -> Tensor:
        """[B, L, ...] -> [N, ...]: what predicts each response token."""
        return _Select.apply(per_position.flatten(0, 1), self.before)


class _Select(torch.autograd.Function):
    """Rows by number, each at most once: their gradients are copied back, where indexing would add them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(0, index, grads[0]), None


class ScalarHead(nn.Linear):
    """A linear layer that computes in float32: bfloat16 would round a score of 10 to steps of 0.06."""

    def forward(self, input: Tensor) -> Tensor:
        """float [..., d] -> float32 [..., 1]."""
        with torch.autocast(input.device.type, enabled=False):
            return linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def widen_heads(model: Model) -> None:
    """Make the linear layers of one output above the model's trunk `ScalarHead`s with the same parameters, in place."""
    trunk = set(unwrap_peft(model).base_model.modules())  # it may have gates of one output
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.out_features == 1 and module not in trunk:
            head = ScalarHead(module.in_features, 1, module.bias is not None, device="meta").train(module.training)
            head.weight, head.bias = module.weight, module.bias
            model.set_submodule(name, head)


class ValueHead(nn.Module):
    """A scalar head on the policy's trunk, zero at first: float [..., d] -> float32 [...]. (`critic: shared`)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = ScalarHead(width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """float [..., d] -> float32 [...], reward units."""
        return self.score(hidden).squeeze(-1)


class ActorCritic(nn.Module):
    """What PPO trains. Its forward pass returns per-token numbers, so that no logits leave an engine."""

    policy_base: Any
    critic_base: Any
    suppress_tokens: Tensor | None = None  # ids that the policy never samples, see `ids_without_token`
    is_gradient_checkpointing = False  # of the module as a whole; TRL asks when it gathers weights

    def __init__(self, policy: Model, critic: Model | ValueHead, temperature: float) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.temperature = temperature
        # The transformers models inside; set so that they are not registered as modules a second time.
        object.__setattr__(self, "policy_base", unwrap_peft(policy))
        object.__setattr__(self, "critic_base", unwrap_peft(critic))
        # What FSDP2 shards one by one, by the name of its class, as in transformers' models.
        names = {
            name for part in (policy, critic) for name in getattr(unwrap_peft(part), "_no_split_modules", None) or ()
        }
        self._no_split_modules = sorted(names & {type(module).__name__ for module in self.modules()})

    def train(self, mode: bool = True) -> "ActorCritic":
        """Adapters alone, with their dropout: a probability ratio compares two passes over the same tokens, so
        everything else computes as it does while sampling."""
        super().train(False)
        self.training = mode
        for module in self.modules():
            if isinstance(module, BaseTunerLayer):
                module.train(mode)
                module.get_base_layer().eval()
        return self

    def forward(
        self, texts: Texts | Tensor, mask: Tensor | None = None, n_response: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the response tokens log-probs, entropies (nats) and values of the states before them: float32 [N] each.

        As rectangles, for which a GPU has to wait: ids int [B, P+T] of prompts padded on the left and responses on
        the right, mask bool [B, P+T], n_response T -> float32 [B, T] twice, zero off the response, and values
        [B, T+1], of which the last one in use is that of the state after the last token.
        """
        if isinstance(texts, Tensor):
            assert mask is not None
            return self._rectangles(texts, mask, n_response)
        states, values = self.states_and_values(texts)
        base = self.policy_base

        def logp(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            logits = suppress(head_logits(base, states), self.suppress_tokens)
            return logp_of(logits, tokens, self.temperature)

        inputs = texts.at_tokens(states), texts.tokens
        # Under ZeRO-3 the head is gathered by all ranks together, as often on each: once.
        flat = logp(*inputs) if self._is_sharded else in_chunks(logp, vocabulary_size(base), *inputs)
        return flat[0], flat[1], texts.at_tokens(values)

    def _rectangles(self, ids: Tensor, mask: Tensor, n_response: int) -> tuple[Tensor, Tensor, Tensor]:
        prompts, responses = token_rows(ids, mask, n_response)
        (texts,) = texts_of(prompts, responses, [range(len(ids))], n_response, ids.device)
        logp, entropy, _ = self(texts)
        values = self.states_and_values(texts)[1]
        first = texts.lengths - mask[:, -n_response:].sum(1) - 1
        columns = first.unsqueeze(1) + torch.arange(n_response + 1, device=ids.device)
        grid = torch.zeros(len(ids) * n_response, device=ids.device)
        logp, entropy = (grid.index_copy(0, texts.places, x).view(-1, n_response) for x in (logp, entropy))
        return logp, entropy, values.gather(1, columns.clamp(max=values.shape[1] - 1))

    def packs(self, longest: int) -> bool:
        """Whether texts of at most so many tokens go through both trunks without padding."""
        shared = isinstance(self.critic, ValueHead)
        trunks = [self.policy_base] if shared else [self.policy_base, self.critic_base]
        return all(packs(trunk, longest) for trunk in trunks)

    @cached_property
    def _is_sharded(self) -> bool:
        """By ZeRO-3; known once the model is prepared."""
        return is_sharded(self.policy)

    def states_and_values(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """The policy's last states float [B, L, d], and the critic's values float32 [B, L], reward units."""
        states = trunk_states(self.policy_base, texts.ids, texts.lengths)
        critic = self.critic
        if isinstance(critic, ValueHead):
            return states, critic(states)
        return states, column_values(self.critic_base, texts.ids, texts.lengths)


@torch.no_grad()
def read_texts(
    trained: "ActorCritic", reference: "FrozenRole", texts: Texts, temperature: float
) -> tuple[Tensor, Tensor]:
    """One pass of policy, critic and reference over finished texts.

    Returns float32 [5, N]: of each response token log-prob, the reference's log-prob, entropy, KL to the reference over
    the whole vocabulary (nats) and the value of the state before it; and [B], the value after the last token.
    """
    policy, ref = trained.policy_base, reference.base
    states, values = trained.states_and_values(texts)
    with reference.active():
        ref_states = trunk_states(ref, texts.ids, texts.lengths)

    def per_token(states: Tensor, ref_states: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        logits = suppress(head_logits(policy, states), trained.suppress_tokens)
        with reference.active():
            ref_logits = suppress(head_logits(ref, ref_states), trained.suppress_tokens)
        logp, entropy = logp_of(logits, tokens, temperature)
        ref_logp, _ = logp_of(ref_logits, tokens, temperature)
        return logp, ref_logp, entropy, exact_kl(logits, ref_logits, temperature)

    inputs = texts.at_tokens(states), texts.at_tokens(ref_states), texts.tokens
    flat = in_chunks(per_token, vocabulary_size(policy), *inputs)
    last = values.flatten().index_select(0, texts.last)
    return torch.stack([*flat, texts.at_tokens(values)]), last


class FrozenRole:
    """A role that is never trained: a separate model, or a trained one with another adapter on, or with none."""

    def __init__(self, model: Model, shared: bool = False, adapter: str | None = None) -> None:
        self.model, self.shared, self.adapter = model, shared, adapter
        self.base = unwrap_peft(model)
        if not shared:
            model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> None:
        """Move a model of its own; a trained one is Accelerate's to move.

        A quantised one stays where it was loaded: a UserError where that is another kind of device.
        """
        if self.shared:
            return
        if not is_quantised(self.model):
            nn.Module.to(self.model, device)
        elif self.model.device.type != device.type:
            name = unwrap_peft(self.model).config.name_or_path or type(unwrap_peft(self.model)).__name__
            raise UserError(
                f"{name}: the quantised model must be on {device.type}, where PPO runs, but is on "
                f"{self.model.device.type}; load it with device_map={{'': {(device.index or 0)!r}}}"
            )

    @contextmanager
    def active(self) -> Iterator[Model]:
        """The model as the role has it, inside the block; outside it, whatever happens, as it was."""
        if not self.shared:
            yield self.model
            return
        assert isinstance(self.model, PeftModel)
        if self.adapter is None:
            with self.model.disable_adapter():
                yield self.model
            return
        trained = self.model.active_adapter
        self.model.set_adapter(self.adapter)
        try:
            yield self.model
        finally:
            self.model.set_adapter(trained)


def keep_adapter(policy: PeftModel) -> str:
    """Copy the policy's active adapter into a frozen one of the same numbers, and return its name."""
    trained, name = policy.active_adapter, _REFERENCE
    config = copy_of_config(policy.peft_config[trained])
    if config.bias != "none":
        raise UserError(
            f"model: expected an adapter with bias 'none', found {config.bias!r}: it trains the base's biases, which "
            "the reference shares; pass a ref_model"
        )
    while name in policy.peft_config:
        name += "_"
    policy.add_adapter(name, config)
    # Embeddings are never adapted here; "auto" would ask the hub whether they were.
    state = get_peft_model_state_dict(policy, adapter_name=trained, save_embedding_layers=False)
    set_peft_model_state_dict(policy, state, adapter_name=name)
    policy.set_adapter(trained)
    return name


def frozen_copy(model: Model) -> Model:
    """An independent copy that is never trained."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def column_values(base: Any, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The scalar head at every position: ids int [B, L], right-padded -> float32 [B, L], reward units.

    No mask: real tokens see those before them only. lengths: as in `trunk_states`.
    """
    return base.score(trunk_states(base, ids, lengths)).squeeze(-1).float()


def token_rows(ids: Tensor, mask: Tensor, n_response: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts padded on the left and responses on the right, int and bool [B, P+T], as token ids on the host."""
    rows = list(zip(ids.cpu(), mask.cpu(), strict=True))
    prompts = [row[:-n_response][real[:-n_response]].tolist() for row, real in rows]
    return prompts, [row[-n_response:][real[-n_response:]].tolist() for row, real in rows]


def texts_of(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    width: int,
    device: torch.device | str,
) -> list[Texts]:
    """The rows of each group as one pass; all passes are copied to the device together.

    prompts (of at least one token) and responses: token ids of each row; groups: row numbers; width: T, the columns of
    the grid that `places` counts in.
    """
    parts: list[np.ndarray] = []
    for group in groups:
        before, answers = [len(prompts[i]) for i in group], [len(responses[i]) for i in group]
        lengths = np.array(before) + answers
        ids = np.zeros((len(group), lengths.max()), dtype=np.int64)
        for row, i in zip(ids, group, strict=True):
            row[: len(prompts[i])] = prompts[i]
            row[len(prompts[i]) : len(prompts[i]) + len(responses[i])] = responses[i]
        start = np.arange(len(group)) * ids.shape[1]
        step = np.concatenate([np.arange(n) for n in answers])
        at = np.repeat(start + before, answers) + step
        places = np.repeat(np.array(group) * width, answers) + step
        parts += [ids, lengths, at - 1, ids.reshape(-1)[at], start + lengths - 1, places, np.array(group)]
    together = torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts]))
    pieces = to_device(together, device).split([part.size for part in parts])
    shaped = [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
    return [Texts(*shaped[i : i + 7]) for i in range(0, len(shaped), 7)]


def trunk_of(model: Any) -> Any:
    """What is below a transformers model's head."""
    trunk = model.base_model
    # It is the model itself where its prefix names no part of it, as Llama 4's does not.
    return getattr(model, "model", trunk) if trunk is model else trunk


def trunk_states(base: Any, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The last states of a transformers model below its head: ids int [B, L], right-padded -> float [B, L, d].

    lengths: int [B], of the texts; with them a model that can computes no padding, where states are then any.
    """
    if lengths is None or not packs(base, ids.shape[1]):
        return trunk_of(base)(**unmasked(base, ids), use_cache=False).last_hidden_state
    packed, given = packed_arguments(ids, lengths)
    return packed.spread(trunk_of(base)(**given).last_hidden_state[0])


def packed_arguments(ids: Tensor, lengths: Tensor) -> tuple[Packed, dict[str, Any]]:
    """How texts are packed, and what a trunk that `packs` gets for them: ids int [B, L], right-padded, lengths [B]."""
    packed = pack(ids, lengths)
    return packed, {
        "input_ids": ids.flatten()[packed.place].unsqueeze(0),
        "position_ids": packed.positions.unsqueeze(0),
        "attention_mask": ids.new_ones(1, 1, 1, 1),  # of four dimensions it is passed on as it is: none is made
        "use_cache": False,
        "packed": packed,
    }


def packed_logits(base: Any, ids: Tensor, lengths: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    """Logits after the last token of each text, float [B, V], of a model that `packs`; ids int [B, L], right-padded.

    The cache gets the packed tokens. Also returns where each place's token is among them, int [B, L].
    """
    packed, given = packed_arguments(ids, lengths)
    states = trunk_of(base)(**given | {"use_cache": True, "past_key_values": cache}).last_hidden_state[0]
    ends = packed.at.gather(1, lengths.unsqueeze(1) - 1).squeeze(1)
    return head_logits(base, states.index_select(0, ends)), packed.at


def vocabulary_size(model: Any) -> int:
    """Logits of a transformers model for each token; one with image parts has them in the config of its text part."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def ids_without_token(
    model: Model, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], device: torch.device
) -> Tensor | None:
    """The ids of the model that the tokenizer has no token for, int [K]; None if there are none.

    Qwen2.5 has 151,936 rows for 151,665 tokens. Where a response may end is never among them.
    """
    known = {*tokenizer.get_vocab().values(), *eos_ids}
    missing = sorted(set(range(unwrap_peft(model).config.get_text_config(decoder=True).vocab_size)) - known)
    return torch.tensor(missing, device=device) if missing else None


def suppress(logits: Tensor, ids: Tensor | None) -> Tensor:
    """Logits float [..., V] with probability 0 at `ids`, int [K] or None, in place.

    Past autograd: where the probability is 0, so is the gradient.
    """
    if ids is not None:
        logits.detach().index_fill_(-1, ids, _NEVER)
    return logits


# Fields of transformers' configs that scale or cap what the output embeddings give; `check_head` refuses models that do
# anything else with it.
_DIVISORS = ("logits_scaling",)  # Granite; MiniCPM3 divides the states
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
_CAPS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "softcap",
)  # Gemma, RecurrentGemma, xLSTM
_MULTIPLIES = "hyperclovax"  # by the field that is a divisor elsewhere


def head_logits(base: Any, states: Tensor) -> Tensor:
    """A causal model's logits of trunk states: float [N, d] -> [N, V].

    The output embeddings, times the scale and under the cap of the model's config: cap * tanh(logits / cap).
    """
    logits: Tensor = base.get_output_embeddings()(states)
    config = base.config.get_text_config(decoder=True)
    for divisor in _numbers(config, _DIVISORS):
        logits = logits * divisor if config.model_type.startswith(_MULTIPLIES) else logits / divisor
    for factor in _numbers(config, _FACTORS):
        logits = logits * factor
    for cap in _numbers(config, _CAPS):
        logits = torch.tanh(logits / cap) * cap
    return logits


def _numbers(config: Any, names: Sequence[str]) -> list[float]:
    found = [getattr(config, name, None) for name in names]
    return [x for x in found if isinstance(x, int | float)]


@torch.no_grad()
def check_head(name: str, model: Model) -> None:
    """A UserError where `head_logits` are not the logits of the model's own forward pass, tried on four tokens.

    name: the model's, in the error. Weights must be whole (`RolloutCollector.gathered_params`).
    """
    base = unwrap_peft(model)
    in_training = [module for module in base.modules() if module.training]
    ids = torch.arange(1, 5, device=base.device).unsqueeze(0)
    base.eval()
    try:
        own = base(input_ids=ids, use_cache=False).logits[0]
        found = None if base.get_output_embeddings() is None else head_logits(base, trunk_states(base, ids)[0])
    finally:
        for module in in_training:
            module.training = True
    # Logits that are not finite are not a matter of the head: they must agree, and training says what is wrong.
    close = 8 * torch.finfo(own.dtype).eps * own.nan_to_num(0, 0, 0).abs().max().item()
    if found is None or found.shape != own.shape or not torch.allclose(found.to(own.dtype), own, 0, close, True):
        raise UserError(
            f"{name}: logits of a {type(base).__name__} are more than its output embeddings, scaled and capped; "
            "use a model of another kind"
        )


def _dot(one: Tensor, two: Tensor) -> Tensor:
    """float32 [..., V] twice -> [...], without a third; autocast would round both to bf16 first."""
    with torch.autocast(one.device.type, enabled=False):
        return torch.linalg.vecdot(one, two)


class _TokenLogp(torch.autograd.Function):
    """Log-prob and entropy from one softmax, which is also all that the backward pass needs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        scaled = logits.float()
        scaled = scaled / temperature if temperature != 1 else scaled
        p = scaled.softmax(-1)
        # The largest probability is 1 over what all were divided by: no second sum of exponentials.
        log_total = scaled.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
        logp = (scaled.gather(-1, tokens.unsqueeze(-1)) - log_total).squeeze(-1)
        entropy = log_total.squeeze(-1) - _dot(p, scaled)
        ctx.save_for_backward(p, tokens)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        p, tokens = ctx.saved_tensors
        grad = (grads[0] / ctx.temperature).unsqueeze(-1)
        p.mul_(-grad)  # in place: it is large, and of no further use
        p.scatter_add_(-1, tokens.unsqueeze(-1), grad)
        return p.to(ctx.dtype), None, None


def logp_of(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of tokens int [...] under logits float [..., V] / temperature, and the entropy, in nats.

    Returns float32 [...] twice; the entropy carries no gradient.
    """
    return _TokenLogp.apply(logits, tokens, temperature)


def exact_kl(logits: Tensor, other: Tensor, temperature: float) -> Tensor:
    """KL of softmax(logits / temperature) to softmax(other / temperature), nats: float [..., V] twice -> [...]."""
    log_p, log_q = ((x.float() / temperature).log_softmax(-1) for x in (logits, other))
    return _dot(log_p.exp(), log_p.sub_(log_q))


def in_chunks(of: Callable[..., tuple[Tensor, ...]], vocabulary: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """of(*inputs), each [N, ...], a few rows at a time, so that N x vocabulary is never whole in memory.

    Where gradients are asked for and one call does not do, each is made once more in the backward pass.
    """
    size = max(1, _MOST_LOGITS // vocabulary)
    if len(inputs[0]) <= size:
        return of(*inputs)
    parts = zip(*(x.split(size) for x in inputs), strict=True)
    if torch.is_grad_enabled():
        done = [checkpoint(of, *part, use_reentrant=False) for part in parts]
    else:
        done = [of(*part) for part in parts]
    return tuple(torch.cat(column) for column in zip(*done, strict=True))
