"""The order of pairs: one for any number of processes, another each epoch, every pair in it."""

from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from rlhf.reward.order import GlobalOrder

LENGTHS = [3, 50, 7, 41, 12, 33, 5, 28, 19, 22, 9, 47, 15]
STRATEGIES = ["random", "group_by_length", "sequential"]


def order(strategy="random", epoch=0, seed=1, batch=4):
    found = GlobalOrder(LENGTHS, batch, seed, strategy)
    found.set_epoch(epoch)
    assert len(list(found)) == len(found)
    return list(found)


def steps(strategy, processes, at_a_time):
    """The rows of each optimizer step, as Accelerate deals them."""
    sampler = BatchSampler(GlobalOrder(LENGTHS, 4, 1, strategy), at_a_time, drop_last=False)
    dealt = [list(BatchSamplerShard(sampler, processes, rank)) for rank in range(processes)]
    parts = 4 // (processes * at_a_time)
    assert {len(micro_batches) for micro_batches in dealt} == {4 * parts}
    micro = [[row for rank in dealt for row in rank[i]] for i in range(4 * parts)]
    return [sorted(row for rows in micro[i : i + parts] for row in rows) for i in range(0, 4 * parts, parts)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_has_the_same_rows_on_any_number_of_processes(strategy):
    one = steps(strategy, 1, 4)
    for processes, at_a_time in ((1, 2), (1, 1), (2, 2), (2, 1), (4, 1)):
        assert steps(strategy, processes, at_a_time) == one


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_pair_comes_once_and_the_first_ones_fill_up_the_last_step(strategy):
    found = order(strategy)
    assert sorted(found[:13]) == list(range(13))
    assert found[13:] == found[:3]
    # 40 places for 13 rows: each three times, and the first one once more.
    longer = order(strategy, batch=40)
    assert Counter(longer) == Counter(longer[:13] * 3 + longer[:1])


def test_an_order_is_that_of_its_seed_and_epoch():
    assert order() == order()
    assert len({tuple(order(epoch=epoch, seed=seed)) for epoch in (0, 1) for seed in (1, 2)}) == 4
    assert order("sequential", epoch=1)[:13] == list(range(13))


def test_grouped_by_length_a_step_has_pairs_of_like_length():
    lengths = [(i * 37) % 64 for i in range(64)]

    def spread(strategy):
        found = list(GlobalOrder(lengths, 4, 1, strategy))
        parts = [[lengths[i] for i in found[start : start + 4]] for start in range(0, 64, 4)]
        return sum(max(part) - min(part) for part in parts)

    assert spread("group_by_length") < spread("random") / 2
