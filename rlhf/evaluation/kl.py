"""KL of a tuned policy to the base model, on responses of the policy."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.functional.batching import passes_of
from rlhf.models.actor_critic import (
    check_head,
    exact_kl,
    head_logits,
    in_chunks,
    suppress,
    texts_of,
    trunk_states,
    vocabulary_size,
)
from rlhf.models.kernels.attention import packs
from rlhf.models.unwrap import unwrap_peft

_ROWS = 16  # responses at a time at most


@torch.no_grad()
def response_kl(
    policy: PreTrainedModel,
    base: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    temperature: float,
    suppress_tokens: Tensor | None = None,
) -> list[float]:
    """KL of policy to base in nats per response: exact over the vocabulary at each position, summed over positions.

    Both distributions are those sampled from, softmax(logits / temperature). The mean over responses of the policy
    estimates the KL between the two distributions over responses. suppress_tokens: as in `decode`.
    A UserError for a model that `check_head` refuses.
    """
    for model in (policy, base):
        check_head(unwrap_peft(model).config.name_or_path, model)

    def per_token(mine: Tensor, other: Tensor) -> tuple[Tensor]:
        logits = suppress(head_logits(unwrap_peft(policy), mine), suppress_tokens)
        other = suppress(head_logits(unwrap_peft(base), other), suppress_tokens)
        return (exact_kl(logits, other, temperature),)

    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    packed = all(packs(unwrap_peft(model), max(lengths)) for model in (policy, base))
    groups = passes_of(lengths, _ROWS, policy.device.type, packed=packed)
    width = max(map(len, responses))
    found = torch.zeros(len(prompts) * width, device=policy.device)
    for texts in texts_of(prompts, responses, groups, width, policy.device):
        states = [texts.at_tokens(trunk_states(unwrap_peft(m), texts.ids, texts.lengths)) for m in (policy, base)]
        (kl,) = in_chunks(per_token, vocabulary_size(policy), *states)
        found.index_copy_(0, texts.places, kl)
    sums: list[float] = found.view(len(prompts), width).sum(1).tolist()
    return sums
