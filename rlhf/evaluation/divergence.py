"""How far a tuned policy is from the base, along the responses that it gave."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rlhf.functional.padding import left_pad, right_pad
from rlhf.models.actor_critic import exact_kl, response_logits

_ROWS = 4  # at a time: the logits of two models over the vocabulary are held at once


@torch.no_grad()
def response_kl(
    policy: PreTrainedModel,
    base: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    temperature: float,
) -> list[float]:
    """KL of policy to base in nats a response: at each of its positions over the whole vocabulary, summed.

    Both distributions are those that are sampled from, softmax(logits / temperature). Its mean over responses of
    the policy estimates the KL of the two distributions over responses.
    """
    pad = policy.config.pad_token_id or 0
    result: list[float] = []
    for start in range(0, len(prompts), _ROWS):
        rows = slice(start, start + _ROWS)
        ids, mask = left_pad(prompts[rows], pad, policy.device)
        answer, answer_mask = right_pad(responses[rows], pad, policy.device)
        ids, mask = torch.cat([ids, answer], 1), torch.cat([mask, answer_mask], 1)
        mine, other = (response_logits(model, ids, mask, answer.shape[1])[:, :-1] for model in (policy, base))
        result += (exact_kl(mine, other, temperature) * answer_mask).sum(1).tolist()
    return result
