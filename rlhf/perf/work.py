"""What a step's passes need at least, in FLOPs and bytes, beside what was computed and how long it took.

Counted from shapes and lengths that are on the host anyway: a GPU does not wait for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from rlhf.distributed.sharding import numel
from rlhf.models.actor_critic import ActorCritic, FrozenRole, ValueHead, trunk_of
from rlhf.models.kernels.attention import packs
from rlhf.models.unwrap import unwrap_peft
from rlhf.perf.hardware import matmul_peak, memory_bandwidth

Rows = Sequence[Sequence[int]]


class TextPasses(NamedTuple):
    """Texts as they go through a model."""

    texts: Rows  # token ids
    passes: Rows  # numbers of the rows in each pass; an empty pass took part with row 0


@dataclass(frozen=True)
class StepPasses:
    """All passes of a PPO step on one rank: planned by the algorithm, read by `Meter`."""

    prompts: Rows  # token ids
    responses: Rows  # token ids
    n_valid: int  # rows after these are padding
    calls: Sequence[tuple[int, int]] = ()  # rows and columns of each call of the policy that sampled
    scored: Rows = ()  # rows of each pass of policy, critic and reference over finished texts
    rewards: Mapping[str, TextPasses] = field(default_factory=dict)  # by reward model
    learned: Rows = ()  # rows of each pass of the update


@dataclass(frozen=True)
class Work:
    """Of one phase: one rank's share, or summed over ranks or steps."""

    tokens: float  # generate: response tokens sampled; score and learn: prompt and response tokens, once per pass
    real: float  # token positions of all models that had to be computed
    computed: float  # token positions that were computed, with padding and finished rows
    ideal_seconds: float  # at this machine's limit
    seconds: float

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def padding(self) -> float:
        """Per cent of what was computed."""
        return 100 * (1 - self.real / max(self.computed, 1))

    @property
    def utilisation(self) -> float:
        """Share of this machine's limit that was reached; of learning it is what others call MFU."""
        return self.ideal_seconds / max(self.seconds, 1e-9)


_Counted = tuple[float, float, float, float]  # all of it but the seconds
FIELDS = tuple(one.name for one in fields(Work))


def rates(work: dict[str, Work], ranks: int) -> dict[str, float]:
    """Sums over all ranks -> perf/PHASE/tokens_per_second, over all ranks, perf/PHASE/padding (per cent) and
    perf/PHASE/limit (0 to 1)."""
    row = {}
    for phase, one in work.items():
        row[f"perf/{phase}/tokens_per_second"] = one.tokens * ranks / max(one.seconds, 1e-9)
        row[f"perf/{phase}/padding"] = one.padding
        row[f"perf/{phase}/limit"] = one.utilisation
    return row


def total(steps: Sequence[dict[str, Work]]) -> dict[str, Work]:
    """Several steps together, by phase."""
    whole: dict[str, Work] = {}
    for step in steps:
        for phase, one in step.items():
            whole[phase] = whole[phase] + one if phase in whole else one
    return whole


class Meter:
    """Counts one rank's work in a step that is done. The machine's limits are measured at the first step."""

    def __init__(
        self,
        trained: ActorCritic,
        reference: FrozenRole,
        rewards: Mapping[str, FrozenRole],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """rewards: reward models by name. dtype: what matrix products are computed in."""
        self.trained, self.reference_role, self.reward_roles = trained, reference, rewards
        self.device, self.dtype = device, dtype

    def step(self, step: StepPasses, seconds: Mapping[str, float]) -> dict[str, Work]:
        """By phase, of those that were timed."""
        texts = [[*prompt, *response] for prompt, response in zip(step.prompts, step.responses, strict=True)]
        answers = list(map(len, step.responses))
        counted = {
            "generate": lambda: self._generated(step, answers[: step.n_valid]),
            "score": lambda: self._scored(step, texts, answers[: step.n_valid]),
            "learn": lambda: self._learned(step, texts, answers),
        }
        return {name: Work(*count(), seconds[name]) for name, count in counted.items() if name in seconds}

    def _generated(self, step: StepPasses, answers: list[int]) -> _Counted:
        computed, n = sum(rows * columns for rows, columns in step.calls), len(answers)
        if not n:
            return 0, 0, computed, 0
        prompts = list(map(len, step.prompts[:n]))
        again = _again(step.prompts, range(n)) if packs(self.trained.policy_base, max(prompts)) else []
        # The last token of a response is never fed. Prompts are bound by matrix products; what follows by those
        # or by memory, whichever takes longer.
        read = self.policy.forward(prompts, n, again) / self.peak
        moved = self.policy.decoded_bytes(prompts, answers, self.dtype.itemsize) / memory_bandwidth(self.device)
        written = max(moved, self.policy.decoding(prompts, answers) / self.peak)
        return sum(answers), sum(prompts) - sum(again) + sum(answers) - n, computed, read + written

    def _scored(self, step: StepPasses, texts: list[list[int]], answers: list[int]) -> _Counted:
        n, trained, groups = len(answers), self.trained, step.scored
        ran = [(self.policy, sum(answers), _Seen.of(trained.policy_base, texts, groups, n))]
        ran += [(self.reference, sum(answers), _Seen.of(self.reference_role.base, texts, groups, n))]
        if self.critic is not None:
            ran += [(self.critic, 0, _Seen.of(trained.critic_base, texts, groups, n))]
        for name, read in step.rewards.items():
            ran += [(self.rewards[name], 0, _Seen.of(self.reward_roles[name].base, read.texts, read.passes, n))]
        needed = sum(flops.forward(seen.lengths, heads, seen.again) for flops, heads, seen in ran)
        real, computed = (sum(getattr(seen, name) for _, _, seen in ran) for name in ("real", "computed"))
        return sum(map(len, texts[:n])), real, computed, needed / self.peak

    def _learned(self, step: StepPasses, texts: list[list[int]], answers: list[int]) -> _Counted:
        trained, groups = self.trained, step.learned
        seen = [_Seen.of(trained.policy_base, texts, groups, len(texts))]
        heads = sum(answers[row] for group in groups for row in group)
        needed = self.policy.training(seen[0].lengths, heads, seen[0].again)
        if self.critic is not None:
            seen += [_Seen.of(trained.critic_base, texts, groups, len(texts))]
            needed += self.critic.training(seen[1].lengths, 0, seen[1].again)
        real, computed = (sum(getattr(one, name) for one in seen) for name in ("real", "computed"))
        return sum(seen[0].lengths), real, computed, needed / self.peak

    @property
    def peak(self) -> float:
        """FLOP/s."""
        return matmul_peak(self.device, self.dtype)

    @cached_property
    def policy(self) -> "Flops":
        """What the policy needs."""
        return Flops.of(self.trained.policy)

    @cached_property
    def critic(self) -> "Flops | None":
        """What the critic needs; None where it is a head on the policy's trunk."""
        critic = self.trained.critic
        return None if isinstance(critic, ValueHead) else Flops.of(critic)

    @cached_property
    def reference(self) -> "Flops":
        """What the reference needs."""
        with self.reference_role.active() as model:
            return Flops.of(model)

    @cached_property
    def rewards(self) -> dict[str, "Flops"]:
        """What the reward models need."""
        found = {}
        for name, role in self.reward_roles.items():
            with role.active() as model:
                found[name] = Flops.of(model)
        return found


@dataclass(frozen=True)
class _Seen:
    """Texts in the passes in which they went through a model."""

    lengths: list[int]  # of each text, once per pass
    again: list[int]  # of beginnings that an earlier text of the pass has, too, where they are computed once
    real: int  # token positions that had to be computed
    computed: int  # and those that were

    @classmethod
    def of(cls, model: Any, texts: Rows, groups: Rows, n: int) -> "_Seen":
        """groups: rows of each pass; one without took part with the first row. Rows from n on are padding."""
        lengths: list[int] = []
        again: list[int] = []
        real = computed = 0
        for group in groups:
            needed, ran = [row for row in group if row < n], group or [0]
            longest = max(len(texts[row]) for row in ran)
            own = [len(texts[row]) for row in needed]
            lengths, real = lengths + own, real + sum(own)
            if packs(model, longest):
                twice = _again(texts, needed)
                again, real = again + twice, real - sum(twice)
                computed += sum(len(texts[row]) for row in ran) - sum(_again(texts, ran))
            else:
                computed += len(ran) * longest
        return cls(lengths, again, real, computed)


def _again(texts: Rows, group: Sequence[int]) -> list[int]:
    """Of each of a pass's texts but the first, the length of the beginning that an earlier one has, too."""
    rows, found = [list(texts[row]) for row in group], []
    for i, row in enumerate(rows[1:], 1):
        found.append(max(_common(row, earlier) for earlier in rows[:i]))
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return len(list(same))


@dataclass(frozen=True)
class Flops:
    """Of one model, as its adapters are now. A multiply and an add are two; norms and activations are left out.

    Linear layers count, and attention, causal and over texts without padding. The head counts apart: only for
    the positions that need it. Experts of a mixture, which are no linear layers in transformers, are not seen.
    """

    trained: int  # elements of the trunk's matrices that have a gradient
    frozen: int  # and of those that have none
    attention: int  # FLOPs a squared token of a text: half of the square, two products
    head: int  # elements of the output embeddings; 0 where there are none
    head_trained: bool
    key_values: int  # numbers that the cache keeps a token
    layers: tuple[tuple[int, int], ...]  # of each matrix, the head's too: elements as stored, bytes of one

    @classmethod
    def of(cls, model: nn.Module) -> "Flops":
        """Read off a transformers model, or a PEFT one with the adapters that are active."""
        base = unwrap_peft(model)
        trunk, config = list(_linear_layers(trunk_of(base))), base.config.get_text_config(decoder=True)
        head = base.get_output_embeddings()
        layers = trunk if head is None else [*trunk, head]
        trained = sum(_elements(layer) for layer in trunk if layer.weight.requires_grad)
        return cls(
            trained=trained,
            frozen=sum(map(_elements, trunk)) - trained,
            attention=2 * sum(_heads(layer) * head_width(layer) for layer in _layers(config)),
            head=_elements(head) if head is not None else 0,
            head_trained=head is not None and head.weight.requires_grad,
            key_values=key_values(config),
            layers=tuple((numel(x.weight), x.weight.element_size()) for x in layers),
        )

    @property
    def matrices(self) -> int:
        """Elements of the trunk's matrices."""
        return self.trained + self.frozen

    def forward(self, lengths: Sequence[int], responses: int = 0, again: Sequence[int] = ()) -> float:
        """A pass over texts of these lengths, logits for so many tokens.

        again: lengths of beginnings that an earlier text of the pass has, too: they count once.
        """
        tokens, square = _distinct(lengths, again)
        return 2.0 * (self.matrices * tokens + self.head * responses) + self.attention * square

    def training(self, lengths: Sequence[int], responses: int = 0, again: Sequence[int] = ()) -> float:
        """The same with its backward pass: twice as much again, where weights are frozen once.

        What gradient checkpointing computes again is not needed, so not in it.
        """
        tokens, square = _distinct(lengths, again)
        trunk = (3 * self.trained + 2 * self.frozen) * tokens
        head = (3 if self.head_trained else 2) * self.head * responses
        return 2.0 * (trunk + head) + 3 * self.attention * square

    def decoding(self, prompts: Sequence[int], responses: Sequence[int]) -> float:
        """Every token after a response's first, one at a time, on a cache of what came before."""
        steps = sum(n - 1 for n in responses)
        return 2.0 * (self.matrices + self.head) * steps + 2 * self.attention * _read(prompts, responses)

    def decoded_bytes(self, prompts: Sequence[int], responses: Sequence[int], size: int) -> float:
        """Moved by the same, in one batch: weights once per step, keys and values of the texts so far.

        size: bytes of a number as it is computed in; weights that are stored in fewer move as they are.
        """
        weights = sum(count * min(stored, size) for count, stored in self.layers)
        return float(weights * (max(responses) - 1) + _read(prompts, responses) * self.key_values * size)


def head_width(config: PretrainedConfig) -> int:
    """Numbers a head of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // (_heads(config) or 1)


def _heads(config: PretrainedConfig) -> int:
    return getattr(config, "num_attention_heads", None) or 0


def key_values(config: PretrainedConfig) -> int:
    """Numbers that a cache keeps of one token."""
    return 2 * sum(_key_heads(layer) * head_width(layer) for layer in _layers(config))


def _key_heads(config: PretrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or _heads(config)


def _layers(config: PretrainedConfig) -> Sequence[PretrainedConfig]:
    """The config as each layer sees it: Gemma 4's differ in the width of a head."""
    return config.per_layer_config if config.is_heterogeneous else [config] * config.num_hidden_layers


def _distinct(lengths: Sequence[int], again: Sequence[int]) -> tuple[int, int]:
    """Tokens, and squared tokens a text, each beginning counted once."""
    tokens, squares = (sum(n**power for n in lengths) - sum(n**power for n in again) for power in (1, 2))
    return tokens, squares


def _read(prompts: Sequence[int], responses: Sequence[int]) -> int:
    """Tokens whose keys and values are looked at: after a prompt of p, the i-th token fed, from 1, sees p + i."""
    return sum((n - 1) * p + (n - 1) * n // 2 for p, n in zip(prompts, responses, strict=True))


def _linear_layers(trunk: nn.Module) -> Iterator[Any]:
    off = set()
    for module in trunk.modules():
        if isinstance(module, LoraLayer):
            on = [] if module.disable_adapters or module.merged else module.active_adapters
            for part in (module.lora_A, module.lora_B):
                off |= {id(layer) for name, layer in part.items() if name not in on}
    for module in trunk.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in off:
            yield module


def _elements(layer: Any) -> int:
    """By the layer's widths: packed in 4 bits or spread by ZeRO-3, its weight has another shape."""
    layer = getattr(layer, "original_module", layer)  # PEFT wraps a head whose embeddings it trains
    return layer.nx * layer.nf if isinstance(layer, Conv1D) else layer.in_features * layer.out_features
