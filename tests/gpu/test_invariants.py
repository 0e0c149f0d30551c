"""At learning rate 0 nothing moves, in each precision that a GPU has; frozen models stay what they were."""

import pytest
import torch
from tiny_ppo import metrics, trainer

RAGGED = [{"prompt": "a b c d e f g h i j k l m n o p"[: 4 * i + 1]} for i in range(8)]
# Precision: options, and how far the mean ratio and the largest may be from 1, and KL to oneself from 0.
PRECISIONS = {
    "fp32": ({}, 1e-5, 1e-3, 1e-5),
    "tf32": ({"tf32": True}, 1e-3, 3e-2, 1e-4),
    "bf16": ({"bf16": True}, 1e-3, 6e-2, 1e-4),
    "fp16": ({"fp16": True}, 1e-3, 3e-2, 1e-4),
}


@pytest.fixture
def precision_as_it_was():
    """TF32 is a setting of the process."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("precision_as_it_was")
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_at_learning_rate_0_nothing_moves(tmp_path, device, place, family, precision, kind):
    if device.type == "cpu" and precision in ("tf32", "fp16"):
        pytest.skip("on a GPU only")
    options, mean, largest, kl = PRECISIONS[precision]
    options = options | place | {"learning_rate": 0.0, "max_steps": 2, "response_length": 24, "num_mini_batches": 2}
    run = trainer(tmp_path, family, lora=kind == "lora", rows=RAGGED, gradient_checkpointing=True, **options)
    frozen = [(p, p.detach().clone()) for p in run.roles.reference.model.parameters()]
    run.train()
    rows = metrics(tmp_path)
    assert len(rows) == 2
    for row in rows:
        assert row["val/ratio"] == pytest.approx(1, abs=mean)
        assert row["val/ratio_max"] == pytest.approx(1, abs=largest)
        assert row["policy/clipfrac_avg"] == 0
        # fp16's scaler begins with a scale that may be too large, and leaves such updates out.
        assert row["val/skipped_updates"] == 0 or precision == "fp16"
        assert abs(row["objective/kl_per_token"]) < kl
        assert row["objective/kl_exact_per_token"] < kl
        assert row["policy/grad_norm"] > 0
    assert rows[-1]["val/updates"] > 0
    assert all(torch.equal(p, before) for p, before in frozen)
    assert {p.device.type for p in run.roles.trained.parameters()} == {device.type}
