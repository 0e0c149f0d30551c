"""Lower precision under DeepSpeed and FSDP2: what is never trained computes in it, too."""

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from workers import launch, rows

from rlhf.distributed.sharding import cast_weights
from rlhf.models.actor_critic import logp_of

WORKER = """
run = trainer(**options)
frozen = [run.roles.reference.model, run.roles.reward.model]
found = " ".join({str(p.dtype) for model in frozen for p in model.parameters()})
sys.stdout.write(f"dtypes {found}\\n")  # one write a rank: what two ranks print in pieces comes out mixed
sys.stdout.flush()
run.train()
"""
BF16 = {"bf16": True, "learning_rate": 0.0, "max_steps": 1, "response_length": 24}
BF16 |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}  # not split: other shapes round otherwise


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_a_policy_that_has_not_learned_is_its_reference(tmp_path, engine):
    said = launch(tmp_path, WORKER, BF16, processes=2, engine=engine)
    assert said.count("dtypes torch.bfloat16\n") == 2, said
    (row,) = rows(tmp_path / "metrics.jsonl")
    for name in ("objective/kl", "objective/kl_k3_per_token", "objective/kl_exact_per_token"):
        assert row[name] == pytest.approx(0, abs=1e-5), name
    assert row["policy/approxkl_avg"] == pytest.approx(0, abs=1e-7)
    assert row["val/ratio"] == pytest.approx(1, abs=1e-6)


class Engine:
    """As much of an Accelerator as says what it is."""

    def __init__(self, kind, precision):
        self.distributed_type, self.mixed_precision = kind, precision


@pytest.mark.parametrize(
    ("kind", "precision", "expected"),
    [
        (DistributedType.DEEPSPEED, "bf16", torch.bfloat16),
        (DistributedType.DEEPSPEED, "fp16", torch.float16),
        (DistributedType.DEEPSPEED, "no", torch.float32),
        (DistributedType.FSDP, "bf16", torch.bfloat16),
        (DistributedType.FSDP, "no", torch.float32),
        (DistributedType.MULTI_GPU, "bf16", torch.float32),  # autocast does it there
    ],
)
def test_only_what_the_engine_would_cast_is_cast(kind, precision, expected):
    model = nn.BatchNorm1d(3).requires_grad_(False)
    model.register_parameter("quantised", nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    cast_weights(Engine(kind, precision), [model])
    assert (model.weight.dtype, model.running_mean.dtype) == (expected, torch.float32)
    assert model.quantised.dtype == torch.uint8


def test_log_probs_of_low_precision_logits_are_computed_in_float32():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 3, 50).bfloat16(), torch.randint(50, (2, 3))
    logp, entropy = logp_of(logits, tokens, 0.7)
    exact = (logits.double() / 0.7).log_softmax(-1)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), exact.gather(2, tokens[..., None])[..., 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), atol=1e-5, rtol=0)
