"""No score, value or log-prob depends on the padding beside it."""

import pytest
import tiny
import torch
from obvious import token_values
from torch.testing import assert_close

from rlhf.models.actor_critic import ActorCritic
from rlhf.reward.scoring import score_tokens

ROWS = [[5, 6, 7, 8, 9, 2], [11, 12, 2], [21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 2]]


def padded(rows, left, extra, pad):
    width = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), True
    return ids, mask


@pytest.mark.parametrize("pad", [0, 2], ids=["pad", "pad=eos"])
@pytest.mark.parametrize("extra", [0, 50])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("make", [tiny.gpt2_reward, tiny.llama_reward])
@torch.no_grad()
def test_scores_and_values_alone_and_in_a_batch(make, left, extra, pad):
    model = make()
    ids, mask = padded(ROWS, left, extra, pad)
    scores, values = score_tokens(model, ids, mask), token_values(model, ids, mask)
    for i, row in enumerate(ROWS):
        alone, whole = torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool)
        assert_close(scores[i], score_tokens(model, alone, whole)[0], atol=1e-5, rtol=0)
        assert_close(values[i][mask[i]], token_values(model, alone, whole)[0], atol=1e-5, rtol=0)
        assert_close(scores[i], values[i][mask[i]][-1])  # at the EOS, not before it


@pytest.mark.parametrize("extra", [0, 50])
@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
@torch.no_grad()
def test_log_probs_alone_and_in_a_batch(make, extra):
    model, responses = make(), [[40, 41, 2], [50, 2], [60]]
    prompt_ids, prompt_mask = padded(ROWS, True, extra, 2)
    response_ids, mask = padded(responses, False, extra, 2)
    ids, attention = torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, mask], 1)
    logp, entropy, _ = ActorCritic(model, tiny.llama_reward(), 0.7)(ids, attention, mask.shape[1])
    for i, (prompt, response) in enumerate(zip(ROWS, responses, strict=True)):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1)
        assert_close(logp[i][mask[i]], expected[range(len(response)), response], atol=1e-5, rtol=0)
        assert_close(entropy[i][mask[i]], -(expected.exp() * expected).sum(-1), atol=1e-4, rtol=0)
