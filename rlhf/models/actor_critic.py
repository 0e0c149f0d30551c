"""The four roles of PPO: policy and critic in one trained module, reference and reward frozen beside it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.functional.masks import position_ids
from rlhf.models.heads import score_tokens, token_values

Model = PreTrainedModel | PeftModel


def token_logp(policy: Model, ids: Tensor, mask: Tensor, n_response: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of each response token, and the entropy of the distribution it came from, in nats.

    ids: int [B, P+T], left-padded prompt and response; mask: bool [B, P+T], True on real tokens.
    Returns float32 [B, T] twice; the entropy carries no gradient. The vocabulary is computed at the T
    positions that predict a response token, and only the two numbers leave this function.
    """
    logits = policy(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        use_cache=False,
        logits_to_keep=n_response + 1,
    ).logits[:, :-1]
    logits = logits.float() / temperature
    log_total = logits.logsumexp(dim=-1)
    logp = logits.gather(2, ids[:, -n_response:].unsqueeze(2)).squeeze(2) - log_total
    with torch.no_grad():
        scaled = logits.detach()
        entropy = log_total - (scaled * torch.softmax(scaled, dim=-1)).sum(dim=-1)
    return logp, entropy.detach()


class ActorCritic(nn.Module):
    """What PPO trains. Its forward pass returns per-token numbers, so that no logits leave an engine."""

    def __init__(self, policy: Model, critic: Model, temperature: float) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.temperature = temperature

    def forward(self, ids: Tensor, mask: Tensor, n_response: int) -> tuple[Tensor, Tensor, Tensor]:
        """ids int [B, P+T], mask bool [B, P+T] -> log-probs, entropies (nats), values, float32 [B, T] each.

        The value beside a response token is that of the state before it.
        """
        logp, entropy = token_logp(self.policy, ids, mask, n_response, self.temperature)
        values = token_values(self.critic, ids, mask)[:, -n_response - 1 : -1]
        return logp, entropy, values


class FrozenRoles:
    """Reference and reward. With adapters they are policy and critic with the adapter off: no copy in memory."""

    def __init__(self, policy: Model, critic: Model, reference: Model | None, reward: Model | None) -> None:
        self._policy, self._critic = policy, critic
        self.reference, self.reward = reference, reward
        for model in (reference, reward):
            if model is not None:
                model.eval().requires_grad_(False)

    @torch.no_grad()
    def reference_logp(self, ids: Tensor, mask: Tensor, n_response: int, temperature: float) -> Tensor:
        """Log-probs of the response tokens under the reference, float32 [B, T]."""
        with _role(self.reference, self._policy) as model:
            return token_logp(model, ids, mask, n_response, temperature)[0]

    @torch.no_grad()
    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The reward model's score of each row, float32 [B]."""
        with _role(self.reward, self._critic) as model:
            return score_tokens(model, ids, mask)


@contextmanager
def _role(own: Model | None, adapted: Model) -> Iterator[Model]:
    if own is not None:
        yield own
    else:
        assert isinstance(adapted, PeftModel)
        with adapted.disable_adapter():
            yield adapted


def frozen_copy(model: Model) -> Model:
    """An independent copy that is never trained."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def disable_dropout(model: nn.Module) -> None:
    """Dropout off for good, also in train mode: a probability ratio compares two passes over the same tokens."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
