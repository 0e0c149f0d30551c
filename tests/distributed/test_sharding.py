"""Weights under an engine: what is cast, which steps were taken, and how many elements a sharded weight has."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from rlhf.distributed.sharding import cast_weights, is_sharded, numel, step_taken
from rlhf.errors import UserError


def model(trained=False):
    made = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float16), nn.BatchNorm1d(2))
    return made.requires_grad_(trained)


@pytest.mark.parametrize(
    ("engine", "precision", "frozen", "trained"),
    [
        (DistributedType.DEEPSPEED, "bf16", torch.bfloat16, torch.bfloat16),
        (DistributedType.DEEPSPEED, "fp16", torch.float16, torch.float16),
        (DistributedType.FSDP, "bf16", torch.bfloat16, torch.float32),  # which FSDP2 casts as it gathers them
        (DistributedType.FSDP, "no", torch.float32, torch.float32),
        (DistributedType.DEEPSPEED, "no", torch.float32, torch.float32),
        (DistributedType.MULTI_GPU, "bf16", torch.float32, torch.float32),
    ],
)
def test_an_engine_that_does_not_cast_gets_weights_in_its_precision(engine, precision, frozen, trained):
    models = [model(), model(trained=True), model()]
    cast_weights(SimpleNamespace(distributed_type=engine, mixed_precision=precision), models)
    for one, dtype in zip(models, (frozen, trained, frozen), strict=True):
        assert (one[0].weight.dtype, one[0].bias.dtype) == (dtype, dtype)
        assert one[1].weight.dtype == torch.float16
        assert one[2].running_mean.dtype == torch.float32  # buffers stay


def test_fsdp_casts_a_model_of_which_a_part_is_trained_by_itself():
    partly = model()
    partly[0].bias.requires_grad_(True)
    cast_weights(SimpleNamespace(distributed_type=DistributedType.FSDP, mixed_precision="bf16"), [partly])
    assert partly[0].weight.dtype == torch.float32


def test_weights_that_were_sharded_while_loading_stay():
    one = model()
    one[0].weight.ds_id, one[0].weight.ds_numel = 7, 400
    assert (is_sharded(one), is_sharded(model())) == (True, False)
    assert (numel(one[0].weight), numel(one[0].bias)) == (400, 2)
    cast_weights(SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, mixed_precision="bf16"), [one])
    assert (one[0].weight.dtype, one[0].bias.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("norm", "done", "found"),
    [(0.5, True, (0.5, True)), (None, True, (0.0, True)), (math.inf, False, (math.inf, False)), (math.nan, True, None)],
)
def test_a_step_with_a_gradient_that_is_not_finite_is_not_taken(norm, done, found):
    engine = SimpleNamespace(get_global_grad_norm=lambda: norm, was_step_applied=lambda: done)
    if found is None:
        with pytest.raises(UserError, match=r"^DeepSpeed: it took step 3 although the gradient is not finite"):
            step_taken(engine, 3)
    else:
        assert step_taken(engine, 3) == found
