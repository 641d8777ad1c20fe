"""Which samples a sampler gives at each position of an epoch, on any number of ranks, from any position."""

import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dtrain.components.samplers import Balanced, LengthBuckets, Weighted
from dtrain.data.orders import Computed, Drawn, Endless, Random, Shuffled
from dtrain.data.samplers import permuted
from dtrain.dataloader import MicroBatch, TrainLoader


class Numbers(Dataset[int]):
    """Item i is the number i, and of every eleventh the label is 1."""

    random = False

    def __init__(self, size: int = 110) -> None:
        self.labels = [int(index % 11 == 0) for index in range(size)]
        self.sites = torch.arange(size) % 2
        self.lengths = [7 * index % 50 + 1 for index in range(size)]
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index

    def label_of_all(self) -> np.ndarray:
        return np.array(self.labels)


def loader(dataset: Any, rank: int = 0, world_size: int = 1, batch_size: int = 4, **more: Any) -> TrainLoader:
    options = {
        "num_workers": 0, "persistent_workers": True, "collate_fn": None, "prefetch_factor": None, "timeout": 0,
        "multiprocessing_context": None, "pin_memory": False, "shuffle": None, "drop_last": False,
    }  # fmt: skip
    return TrainLoader(dataset, 5, rank, world_size, batch_size, **options | more)


def counted(micro: MicroBatch) -> list[int]:
    return [int(item) for item in micro.batch[: micro.samples]]


def steps(micros: list[list[MicroBatch]]) -> list[list[int]]:
    """The samples of each optimizer step, of all ranks, sorted."""
    result: list[list[int]] = [[]]
    for of_ranks in zip(*micros, strict=True):
        assert len({micro.closes for micro in of_ranks}) == len({micro.position for micro in of_ranks}) == 1
        result[-1] += [index for micro in of_ranks for index in counted(micro)]
        if of_ranks[0].closes:
            result.append([])
    return [sorted(step) for step in result[:-1]]


# ------------------------------------------------------------------------------------------------ computed numbers


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 100, 1025])
def test_a_named_permutation_holds_each_number_once(size: int) -> None:
    for name in range(5):
        assert sorted(Random(1).permuted(np.arange(size), size, name, 3)) == list(range(size))


def test_permutations_of_different_names_and_sizes_are_computed_together() -> None:
    numbers = Random(1)
    sizes = np.array([3, 100, 7, 3])
    together = numbers.permuted(np.array([2, 50, 6, 2]), sizes, np.arange(4), 9)
    alone = [int(numbers.permuted(position, size, name, 9)) for name, (position, size) in
             enumerate(zip([2, 50, 6, 2], sizes, strict=True))]  # fmt: skip
    assert together.tolist() == alone


def test_all_orders_of_a_tiny_set_are_about_equally_frequent() -> None:
    orders = Random(2).permuted(np.arange(4), 4, np.arange(2400)[:, None])
    found = Counter(map(tuple, orders.tolist()))
    assert len(found) == 24
    assert (
        min(found.values()) > 50 and max(found.values()) < 160
    )  # expected 100, spread 10; even and odd differ by more


def test_uniform_numbers_are_uniform() -> None:
    values = Random(3).uniform(np.arange(100_000), 7)
    assert np.histogram(values, 10, (0, 1))[0].min() > 9_600  # expected 10,000, spread 95
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.01


# -------------------------------------------------------------------------------------------------------- Balanced


def test_classes_of_ten_to_one_come_in_equal_shares() -> None:
    dataset = Numbers(11_000)
    order = Computed(Balanced(dataset, num_samples=10_000), 0).at(0, np.arange(10_000))
    rare = np.array(dataset.labels)[order].sum()
    assert abs(rare - 5_000) <= 50  # 1 %


def test_within_a_class_each_sample_comes_once_before_any_comes_again_over_epochs() -> None:
    dataset = Numbers(110)  # 100 and 10
    order = Computed(Balanced(dataset), 0)
    epochs = np.concatenate([order.at(epoch, np.arange(110)) for epoch in range(4)])  # 55 of each class in each
    counts = Counter(epochs.tolist())
    assert {counts[index] for index in range(0, 110, 11)} == {22}
    frequent = [counts[index] for index in range(110) if index % 11]
    assert sum(frequent) == 220 and set(frequent) == {2, 3}
    first_two = Counter(epochs[: 2 * 110 - 20].tolist())  # 100 of the frequent class
    assert all(first_two[index] == 1 for index in range(110) if index % 11)


def test_labels_are_found_in_attributes_methods_lists_functions_and_what_wraps_a_dataset() -> None:
    whole = Numbers(110)
    half = Subset(whole, list(range(0, 110, 2)))
    for dataset, by in (
        (whole, "labels"), (whole, "label_of_all"), (whole, whole.labels), (whole, Numbers.label_of_all),
        (half, "labels"), (ConcatDataset([whole, half]), "labels"),
    ):  # fmt: skip
        assert Balanced(dataset, by).counts.tolist() == {
            110: [100, 10], 55: [50, 5], 165: [150, 15]
        }[len(dataset)]  # fmt: skip
    assert sorted(Balanced(whole, ["labels", "sites"]).counts) == [5, 5, 50, 50]


def test_labels_that_are_not_there_are_said_with_what_is_and_what_to_add() -> None:
    with pytest.raises(ValueError, match=r"no attribute or method 'lable' \(did you mean labels\?\).*self\.lable = "):
        Balanced(Numbers(), "lable")
    with pytest.raises(ValueError, match="by: has 3 values; the dataset has 110 samples"):
        Balanced(Numbers(), [0, 1, 0])


# -------------------------------------------------------------------------------------------------------- Weighted


def test_samples_come_as_often_as_their_weights_say(tmp_path: Any) -> None:
    weights = [0.0, 1.0, 3.0, 0.0]
    (tmp_path / "weights.csv").write_text("weight\n0\n1\n3\n0\n")
    np.save(tmp_path / "weights.npy", weights)
    orders = []
    for given in (weights, str(tmp_path / "weights.csv"), str(tmp_path / "weights.npy")):
        order = Computed(Weighted(Numbers(4), given, num_samples=40_000), 0).at(2, np.arange(40_000))
        orders.append(order.tolist())
    assert orders[0] == orders[1] == orders[2]
    found = Counter(orders[0])
    assert set(found) == {1, 2} and abs(found[2] - 30_000) < 400  # spread 87


@pytest.mark.parametrize("weights", [[1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 1.0], [1.0]])
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^weights"):
        Weighted(Numbers(3), weights)


def test_ten_million_samples_begin_an_epoch_at_once_and_keep_no_order() -> None:
    order = Computed(Weighted(Numbers(4), [1.0, 2.0, 3.0, 4.0], num_samples=10_000_000), 0)
    shuffled = Endless(Shuffled(10_000_000, 0), 10_000_000)
    tracemalloc.start()
    for each in (order, shuffled):
        assert len(each.at(9, np.arange(9_000_000, 9_008_192))) == 8_192
    assert tracemalloc.get_traced_memory()[1] < 4_000_000  # bytes
    tracemalloc.stop()


# ------------------------------------------------------------------------------------------------- iterated samplers


class Half:
    """Half of the samples, drawn from every global generator and one of its own."""

    def __init__(self, dataset: Any) -> None:
        self.count, self.rng, self.epochs = len(dataset), np.random.default_rng(), 0

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1  # does not last
        draws = [int(torch.randint(self.count, ())), int(np.random.randint(self.count)), random.randrange(self.count)]
        yield from draws
        yield from self.rng.integers(self.count, size=self.count // 2 - 3).tolist()


def drawn(sampler: Any, epoch: int, seed: int = 5, size: int = 110) -> list[int]:
    order = Drawn(sampler, seed, size)
    return order.at(epoch, np.arange(order.size(epoch))).tolist()


@pytest.mark.parametrize(
    "make",
    [
        Half,
        lambda data: WeightedRandomSampler([1.0] * len(data), 60),
        lambda data: SubsetRandomSampler([3, 5, 8, 13]),
        lambda data: RandomSampler(data, replacement=True, num_samples=30),
        lambda data: RandomSampler(data, generator=torch.Generator()),
    ],
)
def test_what_a_sampler_draws_follows_from_seed_and_epoch_and_leaves_other_generators_alone(make: Any) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = drawn(make(Numbers()), 3)
    torch.rand(3), np.random.rand(3)
    assert drawn(make(Numbers()), 3) == first
    others = [drawn(make(Numbers()), 4), drawn(make(Numbers()), 3, seed=6)]
    assert first not in others and others[0] != others[1]
    torch.set_rng_state(before[0])
    np.random.set_state(("MT19937", np.array(before[1], dtype=np.uint32), 624))
    random.setstate(before[2])
    state = torch.get_rng_state()
    drawn(make(Numbers()), 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_sequential_sampler_and_one_with_set_epoch_give() -> None:
    class Turned(Numbers):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter([(index + self.epoch) % 10 for index in range(10)])

    assert drawn(SequentialSampler(Numbers(4)), 7) == [0, 1, 2, 3]
    assert drawn(Turned(), 3) == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]


class Counting:
    """Gives something else at each iteration, which no epoch accounts for."""

    calls: ClassVar[list[int]] = [0]

    def __iter__(self) -> Iterator[int]:
        self.calls[0] += 1
        return iter([self.calls[0] % 5])


class CountingItself:
    """The same in an attribute of its own."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter([self.epoch % 5])


@pytest.mark.parametrize(
    ("sampler", "text"),
    [
        (Counting(), "another order each time"),
        (CountingItself(), "another order each time"),
        ([0.5, 1.5], "must give indices, one at a time"),
        (WeightedRandomSampler([1.0, 2.0], 60), "weights has 2 values; the dataset has 110 samples"),
        (iter([1, 2]), "cannot be iterated again"),
        ([0, 110], r"the index 110; the dataset has 110 samples"),
        ([[0, 1]], "must give indices, one at a time"),
        ([], "gave no indices"),
    ],
)
def test_samplers_that_cannot_be_used_are_refused(sampler: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Drawn(sampler, 0, 110)


def test_a_sampler_that_runs_out_says_in_which_epoch() -> None:
    class Shrinking(Numbers):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter(range(2 - self.epoch))

    order = Drawn(Shrinking(), 0, 110)
    assert order.size(1) == 1
    with pytest.raises(ValueError, match=r"Shrinking gave no indices \(in epoch 3\)"):
        order.size(2)


# ---------------------------------------------------------------------------------------------------- endless orders


def test_an_endless_order_passes_through_the_data_again_and_again() -> None:
    endless = Endless(Shuffled(10, 3), 7)
    stream = [int(index) for epoch in range(10) for index in endless.at(epoch, np.arange(7))]
    passes = [permuted(np.arange(10), 10, 3, each).tolist() for each in range(7)]
    assert stream == [index for each in passes for index in each]


def test_epochs_longer_than_the_data_hold_several_passes() -> None:
    order = Endless(Shuffled(10, 3), 25).at(0, np.arange(25)).tolist()
    assert Counter(order[:20]) == Counter(dict.fromkeys(range(10), 2))


def test_passes_of_different_lengths_make_no_stream() -> None:
    class Growing:
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter(range(3 + self.epoch))

    with pytest.raises(ValueError, match="gave 4 in one pass and 3 in the first"):
        Endless(Drawn(Growing(), 0, 110), 5).at(0, np.arange(5))


# ------------------------------------------------------------------------------------------------------ LengthBuckets


@pytest.mark.parametrize("settings", [{"batch_size": 8}, {"max_tokens": 200}, {"batch_size": 8, "buckets": 1}])
def test_the_batches_hold_each_sample_once_in_a_new_order_each_epoch(settings: dict[str, int]) -> None:
    dataset = Numbers(1000)
    order = Computed(LengthBuckets(dataset, **settings), 0)
    epochs = []
    for epoch in (0, 1):
        batches = order.at(epoch, np.arange(len(order.sizes(epoch))))
        assert [len(batch) for batch in batches] == order.sizes(epoch).tolist()
        assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
        epochs.append([sorted(batch.tolist()) for batch in batches])
    assert epochs[0] != epochs[1] and sorted(epochs[0]) != sorted(epochs[1]), "batches and what is in them are new"


def test_a_padded_batch_wastes_little_and_holds_no_more_than_asked_for() -> None:
    dataset = Numbers(1000)
    lengths = np.array(dataset.lengths)

    def padded(batches: list[Any]) -> int:
        return sum(len(batch) * int(lengths[batch].max()) for batch in batches)

    order = Computed(LengthBuckets(dataset, max_tokens=200), 0)
    batches = order.at(0, np.arange(len(order.sizes(0))))
    assert max(len(batch) * lengths[batch].max() for batch in batches) <= 200
    assert lengths.sum() / padded(batches) > 0.9
    plain = [permuted(np.arange(first, first + 8), 1000, 0, 0) for first in range(0, 1000, 8)]
    assert lengths.sum() / padded(plain) < 0.6


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "one of the two is needed"), ({"batch_size": 4, "max_tokens": 9}, "one of the two"),
        ({"max_tokens": 20}, r"sample 7 alone has the length 50"), ({"batch_size": 0}, "at least 1"),
    ],
)  # fmt: skip
def test_batches_that_cannot_be_made_are_refused(settings: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LengthBuckets(Numbers(), **settings)


# ------------------------------------------------------------------------------------------------------------- ranks


def batch_samplers(dataset: Numbers) -> list[dict[str, Any]]:
    return [
        {"batch_sampler": LengthBuckets(dataset, max_tokens=120)},
        {"batch_sampler": BatchSampler(RandomSampler(dataset), 7, drop_last=False)},
        {"batch_sampler": LengthBuckets(dataset, batch_size=3), "steps_per_epoch": 9},
    ]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_are_dealt_whole_and_a_step_is_the_same_on_any_number_of_ranks(which: int, drop_last: bool) -> None:
    dataset = Numbers()
    epochs = []
    for world_size in (1, 2, 4):
        more = batch_samplers(dataset)[which] | {"accumulate": 4 // world_size, "drop_last": drop_last}
        ranks = [list(loader(dataset, rank, world_size, **more).epoch(3)) for rank in range(world_size)]
        epochs.append(steps(ranks))
        assert loader(dataset, 0, world_size, **more).steps() == len(epochs[-1])
        for of_ranks in zip(*ranks, strict=True):  # what DDP makes of it is the mean over the step's samples
            step = of_ranks[0].step_samples
            assert [micro.weight for micro in of_ranks] == [micro.samples * world_size / step for micro in of_ranks]
    whole = min(map(len, epochs)) - 1 if drop_last else None  # a last round that is left out is another on fewer ranks
    assert epochs[0][:whole] == epochs[1][:whole] == epochs[2][:whole]


@pytest.mark.parametrize("which", range(4))
def test_an_epoch_resumes_at_any_step_on_any_number_of_ranks(which: int) -> None:
    dataset = Numbers()
    kinds = [*batch_samplers(dataset), {"sampler": Balanced(dataset), "steps_per_epoch": 6}]
    on_one = {"batch_size": 8, "accumulate": 2, **kinds[which]}
    on_two = {"batch_size": 4, "accumulate": 2 if which == 3 else 1, **kinds[which]}
    whole = list(loader(dataset, **on_one).epoch(2))
    expected = steps([whole])
    for number, position in enumerate([micro.position for micro in whole if micro.closes], 1):
        assert steps([list(loader(dataset, **on_one).epoch(2, position))]) == expected[number:]
        assert (
            steps([list(loader(dataset, rank, 2, **on_two).epoch(2, position)) for rank in range(2)])
            == (expected[number:])
        )


def test_a_sample_that_comes_again_has_other_random_numbers() -> None:
    class Noisy(Numbers):
        random = True

        def __getitem__(self, index: int) -> float:
            return index + float(torch.rand(()))

    one = [float(item) for micro in loader(Noisy(), sampler=[3, 3, 3, 4]).epoch(0) for item in micro.batch]
    assert [int(item) for item in one] == [3, 3, 3, 4] and len(set(one)) == 4
    ranks = [list(loader(Noisy(), rank, 2, 2, sampler=[3, 3, 3, 4]).epoch(0)) for rank in range(2)]
    assert sorted(float(item) for micros in ranks for micro in micros for item in micro.batch) == sorted(one)


def test_a_dataset_is_told_its_epoch_in_every_process_before_the_first_sample_of_it() -> None:
    class Told(Numbers):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __getitem__(self, index: int) -> int:
            return 1000 * self.epoch + index

    for options in ({}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": False}):
        dataset = Told(8)
        its = loader(Subset(dataset, range(8)), **options)
        for epoch in (0, 1, 5):
            items = [int(item) for micro in its.epoch(epoch) for item in micro.batch]
            assert sorted(items) == [1000 * epoch + index for index in range(8)]
            assert dataset.epoch == epoch
        del its


def test_a_dataset_may_not_change_its_length_from_epoch_to_epoch() -> None:
    class Growing(Numbers):
        def set_epoch(self, epoch: int) -> None:
            self.size = 8 + epoch

    with pytest.raises(ValueError, match=r"Growing.set_epoch\(1\) changed its length from 8 to 9"):
        list(loader(Growing(8)).epoch(1))
