"""No tensor of batch x response x vocabulary is ever whole: act, judge and learn, forward and backward."""

import pytest
import torch
from tiny_ppo import trainer
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.models import actor_critic as response


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation put out."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                Largest.most = max(Largest.most, x.numel())
        return out


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_largest_tensor_is_far_below_batch_x_response_x_vocabulary(tmp_path, monkeypatch, lora):
    length = 128
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "response_length": length}
    run = trainer(tmp_path, lora=lora, temperature=3.0, **options)
    vocabulary = run.roles.trained.policy.config.vocab_size
    monkeypatch.setattr(response, "_MOST_LOGITS", 8 * vocabulary)
    run._begin(0)
    Largest.most = 0
    with Largest():
        rollout = run.collect(1, run.prompts[:4])
        run.learn(1, rollout, run.compute_advantages(rollout, run.scaler))
    tokens = int(rollout.mask.sum())
    assert tokens > 2 * length  # the responses are long
    weights = max(p.numel() for p in run.roles.trained.parameters())
    text = rollout.ids.numel() * 128  # states of a pass, at the width of the widest layer
    assert Largest.most <= max(16 * vocabulary, weights, text)
    assert Largest.most < tokens * vocabulary / 2
