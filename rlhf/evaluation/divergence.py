"""How far a tuned policy is from the base, along the responses that it gave."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.functional.padding import left_pad, right_pad
from rlhf.models.actor_critic import base_of
from rlhf.models.response import exact_kl, head_logits, in_chunks, rows_of, trunk_states

_ROWS = 16  # at a time


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

    def per_token(mine: Tensor, other: Tensor) -> tuple[Tensor]:
        return (exact_kl(head_logits(base_of(policy), mine), head_logits(base_of(base), other), temperature),)

    pad = policy.config.pad_token_id or 0
    result: list[float] = []
    for start in range(0, len(prompts), _ROWS):
        rows = slice(start, start + _ROWS)
        ids, mask = left_pad(prompts[rows], pad, policy.device)
        answer, answer_mask = right_pad(responses[rows], pad, policy.device)
        ids, mask = torch.cat([ids, answer], 1), torch.cat([mask, answer_mask], 1)
        text = rows_of(ids, mask, answer.shape[1])
        states = [text.flat(trunk_states(base_of(model), text.ids, text.lengths)) for model in (policy, base)]
        (kl,) = in_chunks(per_token, policy.config.vocab_size, *states)
        result += text.spread(kl).sum(1).tolist()
    return result
