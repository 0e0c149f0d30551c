"""How processes connect, how items are divided over ranks, and sums on devices without float64."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from tiny_ppo import trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.cli import evaluate
from rlhf.distributed import collectives
from rlhf.distributed.collectives import Shard, all_sum, gradient_norm, join_processes, sum_and_max
from rlhf.functional.gae import wide, widest


class Met(Exception):  # noqa: N818
    """Raised where the processes would connect."""


@pytest.fixture
def meeting(monkeypatch):
    """One of two ranks, as a launcher starts it, up to the point where it would wait for the other."""
    asked = {}

    def meet(**given):
        asked.update(given)
        raise Met

    before = dict(PartialState._shared_state)
    PartialState._reset_state()
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.distributed, "init_process_group", meet)
    yield asked
    PartialState._reset_state()
    PartialState._shared_state.update(before)


def test_scripts_without_training_arguments_wait_as_long_as_training(meeting):
    with pytest.raises(Met):
        join_processes(1800)
    assert meeting["timeout"] == timedelta(minutes=30)
    assert meeting["backend"] == "gloo"


def test_the_evaluation_waits_as_long_as_its_recipe_says(meeting, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["evaluate", "--runs_dir", str(tmp_path), "--ddp_timeout", "77"])
    with pytest.raises(Met):
        evaluate.main()
    assert meeting["timeout"] == timedelta(seconds=77)


class NoDoubles(TorchDispatchMode):
    """A device without float64, such as Apple's: creating such a tensor is a TypeError."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(found)):
            raise TypeError(f"Cannot convert to float64 on this device: {func}")
        return found


@pytest.fixture
def without_doubles():
    widest.cache_clear()
    with NoDoubles():
        yield
    widest.cache_clear()


def test_a_step_of_ppo_needs_no_float64_where_there_is_none(tmp_path):
    widest.cache_clear()
    run = trainer(tmp_path, max_steps=1, use_score_scaling=False)
    try:
        with NoDoubles():
            run.train()
    finally:
        widest.cache_clear()
    assert run.state.global_step == 1


def test_sums_are_double_where_the_device_has_it(without_doubles):
    accelerator = SimpleNamespace(reduce=lambda values, reduction: values)
    assert all_sum(accelerator, torch.ones(2)).dtype == torch.float32


def test_sums_are_double_elsewhere():
    accelerator = SimpleNamespace(reduce=lambda values, reduction: values)
    assert all_sum(accelerator, torch.ones(2)).dtype == torch.float64
    assert wide(torch.ones(2, dtype=torch.int64)).dtype == torch.float64


@pytest.mark.parametrize(("n_items", "world"), [(0, 2), (1, 3), (5, 1), (5, 2), (6, 2), (7, 4)])
def test_shards_deal_items_in_turn_and_pad_to_equal_length(n_items, world):
    items = [f"item {i}" for i in range(n_items)]
    shards = [Shard(n_items, rank, world) for rank in range(world)]
    assert len({len(shard.rows) for shard in shards}) == 1
    for rank, shard in enumerate(shards):
        valid = [row for row in shard.rows if row >= 0]
        assert valid == list(range(rank, n_items, world))
        assert shard.n_valid == len(valid)
        assert shard.rows[len(valid) :] == [-1] * (len(shard.rows) - len(valid))
        assert shard.is_valid.tolist() == [row >= 0 for row in shard.rows]
        assert shard.of(items) == [items[row] if row >= 0 else items[0] for row in shard.rows]
    dealt = sorted(row for shard in shards for row in shard.rows if row >= 0)
    assert dealt == list(range(n_items))


def test_a_shard_takes_what_it_was_made_for():
    shard = Shard(5, rank=1, world=2)
    with pytest.raises(ValueError, match="5 items was asked to divide 4"):
        shard.of("abcd")
    with pytest.raises(ValueError, match="2 valid rows was given 3 results"):
        shard.gather([1, 2, 3])
    assert Shard.of_rank(3, PartialState()).of("abc") == ["a", "b", "c"]
    assert Shard.of_rank(3, PartialState()).gather([1, 2, 3]) == [1, 2, 3]


def test_sums_and_maxima_over_ranks_by_one_reduction():
    counts, rounds = [[1, 0, 0], [0, 2, 0], [0, 0, 3]], [[5, 1], [2, 7], [4, 4]]

    def rank_of(index, total=None):
        sent = []
        ranks = SimpleNamespace(process_index=index, num_processes=3, device="cpu")
        ranks.reduce = lambda x, reduction: (sent.append(x), x if total is None else total)[1]
        return sum_and_max(ranks, counts[index], rounds[index]), sent

    total = sum(rank_of(index)[1][0] for index in range(3))
    for index in range(3):
        found, sent = rank_of(index, total)
        assert found == ([1, 2, 3], [5, 7])
        assert len(sent) == 1


def test_the_norm_of_all_gradients_is_of_those_there_are():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    model[0].weight.grad, model[1].bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    assert gradient_norm(model) == 5.0


@pytest.mark.parametrize(
    ("word", "cpu"), [("true", True), ("1", True), ("YES", True), ("on", True), ("false", False), ("0", False)]
)
def test_a_launcher_may_ask_for_the_cpu(monkeypatch, word, cpu):
    monkeypatch.setenv("ACCELERATE_USE_CPU", word)
    asked = []
    monkeypatch.setattr(collectives.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(collectives, "check_processes", asked.append)
    monkeypatch.setattr(collectives, "PartialState", lambda **given: asked.append(given["cpu"]))
    join_processes()
    assert asked == [cpu, cpu]
    join_processes(use_cpu=True)
    assert asked[2:] == [True, True]
