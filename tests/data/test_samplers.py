"""The order of samples in an epoch, and which of them a rank gets."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from dtrain.data.samplers import EvaluationShard, ShuffledShard, permuted


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


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_a_tiny_set_sees_all_its_orders(size: int) -> None:
    found = Counter(tuple(permuted(np.arange(size), size, 0, epoch)) for epoch in range(1500))
    orders = [1, 2, 6, 24, 120][size - 1]
    assert len(found) == orders
    expected = 1500 / orders
    assert max(found.values()) < expected + 5 * expected**0.5


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
