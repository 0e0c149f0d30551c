"""Padding changes no token and no number."""

import pytest
import tiny
import torch
from torch.testing import assert_close

from rlhf.generation.decode import generate
from rlhf.reward.scoring import score_tokens

PROMPTS = [[5, 6, 7], [9] * 40, [8, 4, 11, 17, 300, 21, 22], [3]]
MODELS = {"gpt2": (tiny.gpt2, tiny.gpt2_reward), "llama": (tiny.llama, tiny.llama_reward)}


@pytest.mark.parametrize("family", MODELS)
def test_a_batch_decodes_what_each_prompt_does_alone(device, family):
    model = MODELS[family][0]().to(device)
    u = torch.rand(len(PROMPTS), 24, generator=torch.Generator().manual_seed(3))
    alone = [generate(model, [prompt], u[i : i + 1], [2], 1.0)[0] for i, prompt in enumerate(PROMPTS)]
    assert generate(model, PROMPTS, u, [2], 1.0) == alone
    assert max(map(len, alone)) > 8


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_a_score_does_not_know_what_it_was_padded_with(device, family):
    model = MODELS[family][1]().to(device)
    longest = max(map(len, PROMPTS)) + 50
    ids = torch.tensor([row + [7] * (longest - len(row)) for row in PROMPTS], device=device)
    mask = torch.arange(longest, device=device) < torch.tensor([[len(row)] for row in PROMPTS], device=device)
    sizes = [(slice(i, i + 1), slice(len(row))) for i, row in enumerate(PROMPTS)]
    alone = [score_tokens(model, ids[one], mask[one]) for one in sizes]
    assert_close(score_tokens(model, ids, mask), torch.cat(alone), atol=1e-5, rtol=1e-5)
