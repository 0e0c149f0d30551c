"""What a checkpoint holds of a model of which a part is frozen, and what it has to hold when it is loaded."""

import pytest
import torch
from torch import nn

from rlhf.distributed.trained_weights import frozen_norms, load_trained, same_norms, without_frozen_weights

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


def test_below_a_wrapper_what_others_have_stays():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    whole = nn.ModuleDict({"before": nn.Linear(1, 1), "policy": model, "policy2": nn.Linear(1, 1)})
    whole.before.requires_grad_(False)
    own = {"before.weight", "before.bias", "policy2.weight", "policy2.bias"}
    with without_frozen_weights(model):
        assert set(whole.state_dict()) == own | {f"policy.{name}" for name in KEPT}
    assert len(whole.state_dict()) == len(own) + len(KEPT) + 2


def test_norms_of_frozen_weights_by_hand():
    """Of 2 x 30000 in 16 bits the norm is beyond what these can hold; codes of quantised weights have none."""
    model = nn.Module()
    model.a = nn.Parameter(torch.tensor([3.0, 4.0]), requires_grad=False)
    model.b = nn.Parameter(torch.tensor([60000.0, 60000.0], dtype=torch.float16), requires_grad=False)
    model.c = nn.Parameter(torch.tensor([1, 2], dtype=torch.uint8), requires_grad=False)
    model.d = nn.Parameter(torch.tensor([1.0]))
    assert frozen_norms(model) == pytest.approx({"a": 5.0, "b": 60000 * 2**0.5})
    del model.a, model.b
    assert frozen_norms(model) == {}


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"a": 100.0, "b": 0.0}, True),
        ({"a": 100.0005, "b": 0.0}, True),  # the last digits
        ({"a": 100.005, "b": 0.0}, False),
        ({"a": 100.0, "b": 1e-10}, True),
        ({"a": 100.0, "b": 1e-3}, False),
        ({"a": 100.0}, False),
        ({"a": 100.0, "b": 0.0, "c": 0.0}, False),
    ],
)
def test_norms_of_the_same_weights(other, same):
    assert same_norms({"a": 100.0, "b": 0.0}, other) == same
