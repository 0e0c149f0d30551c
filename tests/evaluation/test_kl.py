"""KL on evaluation responses, against a loop over single positions."""

import pytest
import tiny
import torch

from rlhf.evaluation.kl import response_kl

PROMPTS = [[5, 6], [7, 8, 9, 10], [11], [5], [6, 7]]
RESPONSES = [[12, 13, 14], [15], [16, 17], [9, 9, 9, 9], [8]]


def test_against_one_position_at_a_time():
    policy, base = tiny.llama(), tiny.llama()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        total = 0.0
        for t in range(len(response)):
            ids = torch.tensor([prompt + response[:t]])
            with torch.no_grad():
                p, q = (torch.softmax(m(ids).logits[0, -1] / 0.7, -1) for m in (policy, base))
            total += float((p * (p / q).log()).sum())
        expected.append(total)
    assert min(expected) > 0
    assert response_kl(policy, base, PROMPTS, RESPONSES, 0.7) == pytest.approx(expected, abs=1e-5)


def test_a_model_is_at_no_distance_of_itself():
    assert response_kl(tiny.llama(), tiny.llama(), PROMPTS, RESPONSES, 1.0) == pytest.approx([0] * 5, abs=1e-6)


def test_what_may_not_be_sampled_has_no_share_in_either_distribution():
    """Of the tokens that are left, as if there were no others; and each prompt and response alone gives the same."""
    policy, base, barred = tiny.llama(), tiny.llama(3), torch.tensor([0, 9, 399])
    left = [token for token in range(400) if token not in (0, 9, 399)]
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids, at = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
        with torch.no_grad():
            p, q = (torch.softmax(m(ids).logits[0, at][:, left] / 0.7, -1) for m in (policy, base))
        expected.append(float((p * (p / q).log()).sum()))
    found = response_kl(policy, base, PROMPTS, RESPONSES, 0.7, barred)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != pytest.approx(response_kl(policy, base, PROMPTS, RESPONSES, 0.7), rel=1e-4)
