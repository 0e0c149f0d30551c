"""How much of what a step computed it needed, and how long this machine would need for that at its limit.

Counted from lengths that are on the host anyway: a GPU does not wait for it.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch

from rlhf.models.actor_critic import ValueHead
from rlhf.models.kernels.attention import packs
from rlhf.perf.flops import Flops
from rlhf.perf.hardware import matmul_peak, memory_bandwidth
from rlhf.ppo.rollout import Actor, Experience
from rlhf.reward.reward_functions import TextReward, TokenReward
from rlhf.reward.scoring import score_passes

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """Of one phase: a rank's own share, or summed over ranks or steps."""

    tokens: float  # generate: response tokens sampled; score and learn: of prompts and responses, once a pass
    real: float  # token positions of all models that had to be computed
    computed: float  # and those that were, padding and rows that had ended included
    floor: float  # seconds at the limit
    seconds: float

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def padding(self) -> float:
        """Per cent of what was computed."""
        return 100 * (1 - self.real / max(self.computed, 1))

    @property
    def limit(self) -> float:
        """Share of this machine's limit that was reached."""
        return self.floor / max(self.seconds, 1e-9)


_Counted = tuple[float, float, float, float]  # all of it but the seconds
FIELDS = tuple(field.name for field in fields(Work))


def rates(work: dict[str, Work], ranks: int) -> dict[str, float]:
    """Sums over all ranks -> perf/PHASE/tokens_per_second, over all ranks, perf/PHASE/padding (per cent) and
    perf/PHASE/limit (0 to 1)."""
    row = {}
    for phase, one in work.items():
        row[f"perf/{phase}/tokens_per_second"] = one.tokens * ranks / max(one.seconds, 1e-9)
        row[f"perf/{phase}/padding"] = one.padding
        row[f"perf/{phase}/limit"] = one.limit
    return row


def total(steps: Sequence[dict[str, Work]]) -> dict[str, Work]:
    """Several steps together, by phase."""
    whole: dict[str, Work] = {}
    for step in steps:
        for phase, one in step.items():
            whole[phase] = whole[phase] + one if phase in whole else one
    return whole


class Meter:
    """Counts this rank's work of a step that is done; what is measured for that is measured at the first one."""

    def __init__(self, actor: Actor) -> None:
        self.actor, self.roles, self.accelerator = actor, actor.roles, actor.accelerator
        self.device = self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return _DTYPES.get(self.accelerator.mixed_precision, self.roles.trained.policy.dtype)

    def step(self, experience: Experience, learned: list[list[int]], seconds: dict[str, float]) -> dict[str, Work]:
        """By phase, of those that were timed. learned: rows of each pass of the update, none on a rank without."""
        prompts = [len(prompt.input_ids) for prompt in experience.prompts]
        answers = [len(response) for response in experience.responses]
        pairs = zip(experience.prompts, experience.responses, strict=True)
        texts = [prompt.input_ids + response for prompt, response in pairs]
        place, world = self.accelerator.process_index, self.accelerator.num_processes
        n = len(range(place, experience.n_global, world))  # rows after these are filler
        counted = {
            "generate": lambda: self._generated(prompts[:n], answers[:n]),
            "score": lambda: self._scored(texts, answers[:n]),
            "learn": lambda: self._learned(texts, answers, learned),
        }
        return {name: Work(*count(), seconds[name]) for name, count in counted.items() if name in seconds}

    def _generated(self, prompts: list[int], answers: list[int]) -> _Counted:
        computed, n = sum(rows * columns for rows, columns in self.actor.decoded), len(answers)
        if not n:
            return 0, 0, computed, 0
        # The last token of a response is never fed. Prompts are bound by matrix products; what follows by those
        # or by memory, whichever takes longer.
        read = self.policy.forward(prompts, n) / self.peak
        moved = self.policy.decoded_bytes(prompts, answers, self.dtype.itemsize) / memory_bandwidth(self.device)
        written = max(moved, self.policy.decoding(prompts, answers) / self.peak)
        return sum(answers), sum(prompts) + sum(answers) - n, computed, read + written

    def _scored(self, texts: list[list[int]], answers: list[int]) -> _Counted:
        n, trained, asked = len(answers), self.roles.trained, self.actor.asked
        groups = self.actor.observed
        ran = [(self.policy, sum(answers), _Seen.of(trained.policy, texts, groups, n))]
        ran += [(self.reference, sum(answers), _Seen.of(self.roles.reference.model, texts, groups, n))]
        if self.critic is not None:
            ran += [(self.critic, 0, _Seen.of(trained.critic, texts, groups, n))]
        for source in (one for one in asked if isinstance(one, TokenReward | TextReward)):
            model = source.role.model
            groups = score_passes(model, source.rows, source.batch_size)
            ran += [(self.rewards[source.name], 0, _Seen.of(model, source.rows, groups, n))]
        needed = sum(flops.forward(seen.lengths, heads, seen.again) for flops, heads, seen in ran)
        real, computed = (sum(getattr(seen, name) for _, _, seen in ran) for name in ("real", "computed"))
        return sum(map(len, texts[:n])), real, computed, needed / self.peak

    def _learned(self, texts: list[list[int]], answers: list[int], groups: list[list[int]]) -> _Counted:
        trained = self.roles.trained
        seen = [_Seen.of(trained.policy, texts, groups, len(texts))]
        heads = sum(answers[row] for group in groups for row in group)
        needed = self.policy.training(seen[0].lengths, heads, seen[0].again)
        if self.critic is not None:
            seen += [_Seen.of(trained.critic, texts, groups, len(texts))]
            needed += self.critic.training(seen[1].lengths, 0, seen[1].again)
        real, computed = (sum(getattr(one, name) for one in seen) for name in ("real", "computed"))
        return sum(seen[0].lengths), real, computed, needed / self.peak

    @property
    def peak(self) -> float:
        """FLOP/s."""
        return matmul_peak(self.device, self.dtype)

    @cached_property
    def policy(self) -> Flops:
        """What the policy needs."""
        return Flops.of(self.roles.trained.policy)

    @cached_property
    def critic(self) -> Flops | None:
        """What the critic needs; None where it is a head on the policy's trunk."""
        critic = self.roles.trained.critic
        return None if isinstance(critic, ValueHead) else Flops.of(critic)

    @cached_property
    def reference(self) -> Flops:
        """What the reference needs."""
        with self.roles.reference.active() as model:
            return Flops.of(model)

    @cached_property
    def rewards(self) -> dict[str, Flops]:
        """What the reward models need."""
        found = {}
        for source in self.actor.rewards:
            if isinstance(source, TokenReward | TextReward):
                with source.role.active() as model:
                    found[source.name] = Flops.of(model)
        return found


@dataclass(frozen=True)
class _Seen:
    """Texts in the passes in which they went through a model."""

    lengths: list[int]  # of each text, once a pass
    again: list[int]  # of beginnings that an earlier text of the pass has, too, where they are computed once
    real: int  # token positions that had to be computed
    computed: int  # and those that were

    @classmethod
    def of(cls, model: Any, texts: list[list[int]], groups: list[list[int]], n: int) -> "_Seen":
        """groups: rows of each pass; one without took part with the first row. Rows from n on are filler."""
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


def _again(texts: list[list[int]], group: list[int]) -> list[int]:
    """Length of the common beginning of a pass's texts, for each of them but the first."""
    if len(group) < 2:
        return []
    one, other = (which(texts[row] for row in group) for which in (min, max))
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [len(list(same))] * (len(group) - 1)
