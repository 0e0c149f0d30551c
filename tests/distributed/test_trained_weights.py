"""What a checkpoint holds of a model of which a part is frozen, and what it has to hold when it is loaded."""

import pytest
from torch import nn

from rlhf.distributed.trained_weights import load_trained, without_frozen_weights

KEPT = {"1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_frozen_weights_may_be_missing_and_nothing_else():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    with without_frozen_weights(model):
        state = model.state_dict()
    assert set(state) == KEPT
    load_trained(state, model)
    load_trained(model.state_dict(), model)
    for name in KEPT - {"1.num_batches_tracked"}:  # which PyTorch makes up where there is none
        with pytest.raises(RuntimeError, match=f"^no {name}$"):
            load_trained({key: value for key, value in state.items() if key != name}, model)
    with pytest.raises(RuntimeError, match=r"^unknown 2\.weight$"):
        load_trained(state | {"2.weight": state["1.weight"]}, model)
