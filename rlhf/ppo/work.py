"""How much of what a step computed it needed, and how long this machine would need for that at its limit.

Counted from lengths that are on the host anyway: a GPU does not wait for it.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property

import torch

from rlhf.functional.batching import passes_of
from rlhf.models.actor_critic import ValueHead
from rlhf.models.flops import Flops
from rlhf.ppo.actor import Actor, Experience
from rlhf.reward.sources import TextReward, TokenReward
from rlhf.runtime.hardware import matmul_peak, memory_bandwidth

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

    def step(
        self, experience: Experience, learned: Sequence[torch.Tensor], seconds: dict[str, float]
    ) -> dict[str, Work]:
        """By phase, of those that were timed. learned: rows of each pass of the update, none on a rank without."""
        prompts = [len(prompt.input_ids) for prompt in experience.prompts]
        responses = [len(response) for response in experience.responses]
        place, world = self.accelerator.process_index, self.accelerator.num_processes
        n = len(range(place, experience.n_global, world))  # rows after these are filler
        counted = {
            "generate": lambda: self._generated(prompts, responses, n),
            "score": lambda: self._scored(prompts, responses, n),
            "learn": lambda: self._learned(prompts, responses, [rows.tolist() for rows in learned]),
        }
        return {name: Work(*count(), seconds[name]) for name, count in counted.items() if name in seconds}

    def _generated(self, prompts: list[int], responses: list[int], n: int) -> _Counted:
        computed = sum(rows * columns for rows, columns in self.actor.decoded)
        prompts, responses = prompts[:n], responses[:n]
        if not n:
            return 0, 0, computed, 0
        # The last token of a response is never fed. Prompts are bound by matrix products; what follows by those
        # or by memory, whichever takes longer.
        read = self.policy.forward(prompts, n) / self.peak
        moved = self.policy.decoded_bytes(prompts, responses, self.dtype.itemsize) / memory_bandwidth(self.device)
        written = max(moved, self.policy.decoding(prompts, responses) / self.peak)
        return sum(responses), sum(prompts) + sum(responses) - n, computed, read + written

    def _scored(self, prompts: list[int], responses: list[int], n: int) -> _Counted:
        lengths = [a + b for a, b in zip(prompts, responses, strict=True)]
        models = [(self.policy, sum(responses[:n])), (self.reference, sum(responses[:n]))]
        models += [(self.critic, 0)] if self.critic is not None else []
        tokens = sum(lengths[:n])
        real, needed = len(models) * tokens, sum(model.forward(lengths[:n], heads) for model, heads in models)
        computed = len(models) * _padded(lengths, [rows.tolist() for rows in self.actor.observed])
        for source in self.actor.asked:
            if isinstance(source, TokenReward | TextReward):
                own = source.lengths
                real, needed = real + sum(own[:n]), needed + self.rewards[source.name].forward(own[:n])
                computed += _padded(own, passes_of(own, source.batch_size, self.device.type))
        return tokens, real, computed, needed / self.peak

    def _learned(self, prompts: list[int], responses: list[int], passes: list[list[int]]) -> _Counted:
        lengths = [a + b for a, b in zip(prompts, responses, strict=True)]
        rows = [row for group in passes for row in group]
        every = [lengths[row] for row in rows]
        needed = self.policy.training(every, sum(responses[row] for row in rows))
        needed += self.critic.training(every) if self.critic is not None else 0
        models = 1 if self.critic is None else 2
        # A rank without rows takes part with its first.
        computed = models * _padded(lengths, [group or [0] for group in passes])
        return sum(every), models * sum(every), computed, needed / self.peak

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


def _padded(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> int:
    return sum(len(group) * max(lengths[row] for row in group) for group in groups)
