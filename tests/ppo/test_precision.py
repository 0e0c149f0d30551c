"""Mixed precision reaches every role, in the rollout as in learning."""

import pytest
import torch
from tiny_ppo import trainer


@pytest.mark.parametrize("bf16", [False, True])
def test_autocast_is_on_in_every_role_and_in_generation(tmp_path, bf16):
    run = trainer(tmp_path, bf16=bf16, max_steps=1)
    assert run.accelerator.mixed_precision == ("bf16" if bf16 else "no")
    seen, scores = {}, []

    def watch(role, model):
        def note(module, inputs, output):
            phase = "learning" if torch.is_grad_enabled() else "rollout"
            seen.setdefault((role, phase), set()).add(output.dtype)

        model.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(note)
        if hasattr(model, "score"):
            model.score.register_forward_hook(lambda module, inputs, output: scores.append(output.dtype))

    watch("policy", run.roles.trained.policy)
    watch("critic", run.roles.trained.critic)
    watch("reference", run.roles.reference.model)
    watch("reward", run.roles.reward.model)
    lengths = []
    run.roles.trained.policy.register_forward_hook(
        lambda module, inputs, output: lengths.append(output.logits.shape[1]), always_call=True
    )
    run.train()
    expected = {torch.bfloat16 if bf16 else torch.float32}
    roles = [("policy", "learning"), ("critic", "learning")]
    roles += [(role, "rollout") for role in ("policy", "critic", "reference", "reward")]
    assert seen == dict.fromkeys(roles, expected)
    assert set(scores) == {torch.float32}
    assert 1 in lengths  # generation, one token at a time, was among the rollout's passes
    assert {p.dtype for p in run.roles.trained.parameters()} == {torch.float32}  # the weights themselves stay
