"""A rank's part of a checkpoint, as one process writes and reads it; launched processes have tests of their own."""

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import nn

from rlhf.distributed.saved_weights import load_part, saved_weights
from rlhf.distributed.sharded_state import load_state, save_state


class Rank:
    """Notes what Accelerate itself would save: nothing of models and optimizers under FSDP2."""

    def __init__(self, rank, *parts, kind=DistributedType.FSDP):
        self.process_index, self.distributed_type, self.seen = rank, kind, []
        self._models, self._optimizers = [model for model, _ in parts], [optimizer for _, optimizer in parts]

    def save_state(self, folder, **options):
        self.seen.append((list(self._models), list(self._optimizers), options))

    load_state = save_state


def trained(steps, seed=0):
    """A model whose first layer is frozen, after so many steps; the bias is in a group of its own."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    groups = [{"params": [model[1].weight], "lr": 0.5}, {"params": [model[1].bias], "lr": 0.25}]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 2)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_what_is_trained_and_its_moments_come_back(tmp_path):
    model, optimizer = trained(2)
    one = Rank(1, (model, optimizer))
    save_state(one, tmp_path, safe_serialization=True)
    assert one.seen == [([], [], {"safe_serialization": True})]
    assert (one._models, one._optimizers) == ([model], [optimizer])
    assert [path.name for path in tmp_path.iterdir()] == ["shard-1.pt"]
    assert set(torch.load(tmp_path / "shard-1.pt")["weights"]) == {"1.weight", "1.bias"}

    other, theirs = trained(1, seed=5)
    frozen = other[0].weight.clone()
    load_state(Rank(1, (other, theirs)), tmp_path)
    assert torch.equal(other[1].weight, model[1].weight)
    assert torch.equal(other[1].bias, model[1].bias)
    assert torch.equal(other[0].weight, frozen)
    for mine, found in zip(optimizer.state.values(), theirs.state.values(), strict=True):
        assert mine["step"] == found["step"] == 2
        assert torch.equal(mine["exp_avg"], found["exp_avg"])
    assert [group["lr"] for group in theirs.param_groups] == [0.5, 0.25]


def test_another_engine_is_accelerates_own(tmp_path):
    model, optimizer = trained(1)
    one = Rank(0, (model, optimizer), kind=DistributedType.MULTI_GPU)
    save_state(one, tmp_path)
    load_state(one, tmp_path)
    assert one.seen == [([model], [optimizer], {})] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_other_weights_is_refused(tmp_path):
    model, optimizer = trained(1)
    save_state(Rank(0, (model, optimizer)), tmp_path)
    wide = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    wide[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"^weights with other names or shapes: 1\.bias, 1\.weight$"):
        load_state(Rank(0, (wide, torch.optim.AdamW(wide[1].parameters()))), tmp_path)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"^weights with other names or shapes: 0\.bias, 0\.weight$"):
        load_state(Rank(0, (model, optimizer)), tmp_path)
    model[0].requires_grad_(False)
    together = torch.optim.AdamW(model[1].parameters())
    with pytest.raises(ValueError, match=r"^an optimizer of \[1, 1\] weights, while this run has \[2\]$"):
        load_state(Rank(0, (model, together)), tmp_path)


def test_an_error_gives_the_models_back(tmp_path):
    model, optimizer = trained(0)
    one = Rank(0, (model, optimizer))

    def fail(folder):
        raise OSError("full")

    one.save_state = fail
    with pytest.raises(OSError, match="full"):
        save_state(one, tmp_path)
    assert one._models == [model]


def test_parts_are_joined_by_rows_in_the_order_of_the_ranks(tmp_path):
    """Of eleven ranks: 10 comes after 2."""
    for rank in range(11):
        torch.save({"weights": {"a": torch.full((1, 2), float(rank))}}, tmp_path / f"shard-{rank}.pt")
    assert saved_weights(tmp_path)["a"].tolist() == [[float(rank)] * 2 for rank in range(11)]
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")  # what one process writes goes first
    assert saved_weights(tmp_path)["a"].tolist() == [0.0]


def test_a_tied_weight_may_be_saved_under_either_name():
    def tied():
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
        model[1].weight = model[0].weight
        return model

    one = tied()
    for name in ("0.weight", "1.weight"):
        weights = {f"policy.{key}": x for key, x in one.state_dict().items() if key in (name, "2.weight", "2.bias")}
        other = tied()
        load_part(other, weights | {"critic.0.weight": torch.zeros(3)}, "policy.")
        assert torch.equal(other[0].weight, one[0].weight)
    del weights["policy.2.bias"]
    with pytest.raises(RuntimeError, match=r"^no 2\.bias$"):
        load_part(tied(), weights, "policy.")
    with pytest.raises(RuntimeError, match=r"^no 2\.bias; unknown 3\.bias$"):
        load_part(tied(), weights | {"policy.3.bias": torch.zeros(1)}, "policy.")
