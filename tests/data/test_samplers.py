"""The order of samples in an epoch, and which of them a rank gets."""

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from dtrain.data.samplers import MOST_LISTED, ORDER, EvaluationShard, ShuffledShard, permuted


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 1024, 4097, 65_537])
def test_an_epochs_order_holds_every_sample_once(size: int) -> None:
    for seed, epoch in ((0, 0), (0, 1), (7, 3)):
        assert sorted(permuted(np.arange(size), size, seed, epoch)) == list(range(size))


def test_a_position_has_the_same_sample_whoever_asks_and_with_whatever_else() -> None:
    whole = permuted(np.arange(1000), 1000, 3, 5)
    asked = np.array([999, 0, 500, 500, 17])
    assert permuted(asked, 1000, 3, 5).tolist() == whole[asked].tolist()


def test_each_epoch_and_each_seed_has_an_order_of_its_own() -> None:
    orders = {tuple(permuted(np.arange(100), 100, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_tiny_set_has_each_of_its_orders_equally_often(size: int, seed: int) -> None:
    orders = math.factorial(size)
    epochs = max(1000, 20 * orders)
    found = Counter(tuple(permuted(np.arange(size), size, seed, epoch).tolist()) for epoch in range(epochs))
    expected, freedom = epochs / orders, orders - 1
    chi_squared = sum((found[order] - expected) ** 2 / expected for order in itertools.permutations(range(size)))
    # By Wilson and Hilferty (1931) its cube root is normal: 4 deviations are 1 in 16,000, and all of it is seeded.
    spread = 2 / (9 * freedom)
    assert abs((chi_squared / freedom) ** (1 / 3) - (1 - spread)) < 4 * spread**0.5


@pytest.mark.parametrize("size", [5, 16, 64, MOST_LISTED, MOST_LISTED + 1, 20_000, 65_536])
def test_odd_permutations_are_as_frequent_as_even_ones(size: int) -> None:
    epochs = 400 if size < 100 else 40
    odd = sum(is_odd(permuted(np.arange(size), size, 0, epoch)) for epoch in range(epochs))
    assert abs(odd - epochs / 2) < 4 * (epochs / 4) ** 0.5


def is_odd(order: np.ndarray) -> bool:
    seen, cycles = np.zeros(len(order), bool), 0
    targets = order.tolist()
    for first in range(len(targets)):
        cycles += not seen[first]
        while not seen[first]:
            seen[first], first = True, targets[first]
    return (len(targets) - cycles) % 2 == 1


@pytest.mark.parametrize("size", [MOST_LISTED + 1, 65_536, 10**6])
@pytest.mark.parametrize("apart", [1, 2, 128, 1024, "last"])
def test_two_positions_of_a_large_set_have_nothing_to_do_with_one_another(size: int, apart: int | str) -> None:
    """Where both lie, in 8 x 8 fields of the set, over epochs; and in halves by the samples' own last bits."""
    other = size - 1 if apart == "last" else apart
    pairs = np.array([permuted(np.array([0, other]), size, 1, epoch) for epoch in range(3000)])
    for fields in (pairs * 8 // size, pairs % 8):
        counts = np.zeros((8, 8))
        np.add.at(counts, (fields[:, 0], fields[:, 1]), 1)
        expected, freedom = len(pairs) / 64, 63
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_squared - freedom) < 4.5 * (2 * freedom) ** 0.5


def test_a_training_of_before_ends_its_epoch_in_the_order_in_which_it_began() -> None:
    """The order of version 1, as the program of before gave it."""
    assert permuted(np.arange(12), 12, 3, 5, version=1).tolist() == [5, 7, 4, 6, 10, 3, 9, 8, 0, 1, 11, 2]
    shard = ShuffledShard(12, seed=3, rank=0, world_size=1, batch_size=4)
    shard.set_epoch(5, 4, order=1)
    assert [batch[1:] for batch in shard] == [[10, 3, 9, 8], [0, 1, 11, 2]]
    shard.set_epoch(6)
    assert shard.order == ORDER


@pytest.mark.parametrize("size", [7, 10, 50])
def test_every_sample_comes_everywhere_equally_often(size: int) -> None:
    epochs = 1000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), permuted(np.arange(size), size, 1, epoch)] += 1
    expected = epochs / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5


def test_neighbours_do_not_stay_neighbours() -> None:
    order = permuted(np.arange(100_000), 100_000, 0, 0)
    assert np.mean(np.abs(np.diff(order)) == 1) < 1e-3
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02


def test_a_billion_samples_cost_no_memory_and_no_time() -> None:
    size = 10**9
    tracemalloc.start()
    shard = ShuffledShard(size, seed=0, rank=1, world_size=4, batch_size=8)
    shard.set_epoch(2, start=123_456_789)
    seen: list[int] = []
    for batch, _ in zip(shard, range(10_000), strict=False):
        assert batch[0] == 2
        seen += batch[1:]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 20e6
    assert len(set(seen)) == len(seen) == 80_000
    assert 0 <= min(seen) < size / 100 and size * 0.99 < max(seen) < size
    assert abs(np.mean(seen) / size - 0.5) < 0.01
    assert len(shard) == -(-(size - 123_456_789) // 32)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_sees_each_sample_once_in_the_batches_of_one_process(world_size: int, batch_size: int) -> None:
    for size in range(1, 41):
        alone = [batch[1:] for batch in EvaluationShard(size, 0, 1, batch_size)]
        assert [index for batch in alone for index in batch] == list(range(size))
        found: dict[int, list[int]] = {}
        for rank in range(world_size):
            shard = EvaluationShard(size, rank, world_size, batch_size)
            own = [batch[1:] for batch in shard]
            assert len(shard) == len(own)
            found |= {rank + number * world_size: batch for number, batch in enumerate(own)}
        assert [found[number] for number in sorted(found)] == alone
        assert sorted(found) == list(range(len(alone)))
