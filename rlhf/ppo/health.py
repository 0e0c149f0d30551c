"""Warnings while a PPO run goes wrong: what is wrong, and what usually helps."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rlhf.config import PPOConfig
from rlhf.file_types import WarningRow, WarningState

EXPLODED = 0.5  # nats per token; the usual band is 0.02 to 0.1

BAND = 0.05  # nats per token, if kl_target is not set

AVERAGED = 3  # steps: with few prompts a single one's KL is noisy

# A jump: a mean over so many steps, less its standard error, is 3 times the lowest of the five such means before it.
JUMP, WITHIN = 3, 5

COLLAPSED = 0.1  # share of the entropy at the beginning

BEGINNING = 3  # steps whose mean entropy that is

PATIENCE = 3  # steps in a row before a warning; a KL that explodes or jumps does not wait

AGAIN = 50  # steps until a warning is repeated

WORSE = 2  # times the value of the last warning: repeated at once

_HELPS = {
    "kl_exploded": "a lower learning_rate, a higher kl_coef or an adaptive one (kl_target), fewer num_ppo_epochs, "
    "stopping updates early (target_kl)",
    "kl_jumped": "a lower learning_rate or a longer warmup_steps, stopping updates early (target_kl), score_clip",
    "kl_high": "a lower learning_rate, a higher kl_coef or an adaptive one (kl_target); what is gained there is often "
    "the reward model's taste alone: see what a second one says",
    "all_empty": "a reward that prefers an answer to none, a higher kl_coef, a lower learning_rate",
    "all_cut": "a longer response_length, the stop_token_id that the policy was trained with, missing_eos_penalty",
    "all_same": "a higher kl_coef, a lower learning_rate, a higher temperature; look in samples.jsonl at what it earns",
    "scores_flat": "a reward that tells responses apart: look at samples.jsonl; from equal scores only KL is learned",
    "entropy_collapsed": "a higher kl_coef, a lower learning_rate, fewer num_ppo_epochs, a higher temperature",
}


@dataclass(frozen=True)
class Symptom:
    """Something wrong in a row of metrics. value: grows as it gets worse; 0 if there are no degrees."""

    kind: str
    seen: str
    value: float = 0.0


class HealthMonitor:
    """Checks the metrics of each step. Reports each kind of symptom once; again if it got worse or AGAIN steps passed.

    say gets a row of warnings.jsonl: step, kind, since (the first step with it), seen, helps.
    """

    def __init__(self, args: PPOConfig, say: Callable[[WarningRow], None]) -> None:
        self.args, self.say = args, say
        self.kls: deque[float] = deque(maxlen=WITHIN + AVERAGED)
        self.entropies: list[float] = []  # nats per token, of the beginning
        self.since: dict[str, int] = {}
        self.said: dict[str, tuple[int, float]] = {}  # kind -> step and value

    def state(self) -> WarningState:
        """What a checkpoint keeps, so that a resumed run warns as one that was never stopped."""
        return {"kls": list(self.kls), "entropies": self.entropies, "since": self.since, "said": self.said}

    def load(self, state: WarningState) -> None:
        """What `state` gave, as JSON brings it back."""
        self.kls.extend(state["kls"])
        self.entropies, self.since = list(state["entropies"]), dict(state["since"])
        self.said = {kind: (step, value) for kind, (step, value) in state["said"].items()}

    def check(self, step: int, row: dict[str, float], n: int) -> None:
        """n: responses of the step, over all ranks."""
        if row["objective/response_length"] == 0:  # nothing in it was finite: see skipped.jsonl
            return
        symptoms = [*self._kl(row), *_responses(row, n), *self._entropy(row)]
        self.since = {symptom.kind: self.since.get(symptom.kind, step) for symptom in symptoms}
        for symptom in symptoms:
            since = self.since[symptom.kind]
            lasts = step - since + 1 >= (1 if symptom.kind in ("kl_exploded", "kl_jumped") else PATIENCE)
            if lasts and self._is_news(symptom, step):
                self.said[symptom.kind] = step, symptom.value
                helps = _HELPS[symptom.kind]
                self.say({"step": step, "kind": symptom.kind, "since": since, "seen": symptom.seen, "helps": helps})

    def _is_news(self, symptom: Symptom, step: int) -> bool:
        if symptom.kind not in self.said:
            return True
        when, value = self.said[symptom.kind]
        return step - when >= AGAIN or symptom.value > WORSE * value

    def _kl(self, row: dict[str, float]) -> Iterator[Symptom]:
        kl, target = row["objective/kl_per_token"], self.args.kl_target or BAND
        self.kls.append(kl)
        values = list(self.kls)
        *before, now = [sum(values[i - AVERAGED : i]) / AVERAGED for i in range(AVERAGED, len(values) + 1)] or [0.0]
        lowest = min(before, default=now)
        # The standard error of `now`. One high step among equal ones moves a mean by as much as its standard error.
        noise = math.sqrt(sum((value - now) ** 2 for value in values[-AVERAGED:]) / (AVERAGED * (AVERAGED - 1)))
        limit = max(EXPLODED, 5 * target)
        if kl > limit:
            yield Symptom("kl_exploded", f"KL to the reference is {kl:.3g} nats per token, over {limit:g}", kl)
        elif now - noise > max(2 * target, JUMP * lowest):
            means = f"from {lowest:.3g} to {now:.3g} nats per token, as means over {AVERAGED} steps"
            yield Symptom("kl_jumped", f"KL to the reference rose {means}", now)
        elif now - noise > 2 * target and not self.said.keys() & {"kl_exploded", "kl_jumped"}:  # they have said more
            mean = f"{now:.3g} nats per token over the last {AVERAGED} steps, above {2 * target:g}"
            yield Symptom("kl_high", f"KL to the reference is {mean}", now)

    def _entropy(self, row: dict[str, float]) -> Iterator[Symptom]:
        entropy = row["objective/entropy"] / row["objective/response_length"]
        if len(self.entropies) < BEGINNING:
            self.entropies.append(entropy)
            return
        first = sum(self.entropies) / BEGINNING
        if entropy < COLLAPSED * first:
            yield Symptom("entropy_collapsed", f"entropy is {entropy:.3g} nats per token, and was {first:.3g} at first")


def _responses(row: dict[str, float], n: int) -> Iterator[Symptom]:
    length, ended = row["objective/response_length"], row["objective/eos_rate"]
    if length <= 1 and ended == 1:
        yield Symptom("all_empty", "all responses are empty, an EOS alone")
    elif row["val/all_responses_same"]:
        yield Symptom("all_same", "all responses are the same text")
    if ended == 0:
        yield Symptom("all_cut", f"no response ends by itself, all are truncated after {length:.0f} tokens")
    mean = row["objective/scores"]
    if n > 1 and row["objective/scores_std"] <= 1e-6 * max(1, abs(mean)):
        yield Symptom("scores_flat", f"all scores are {mean:.4g}")


def warning_line(row: WarningRow) -> str:
    """A row of warnings.jsonl in words."""
    helps = f"what usually helps: {row['helps']} (docs/tuning.md)"
    return f"step {row['step']}: {row['seen']}, since step {row['since']}; {helps}"
