"""A start with other ranks than the training began with: each step has the same samples, in the same order."""

import itertools
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset

from dtrain.dataloader import MicroBatch, TrainLoader

SIZE, BATCH, MEANT_FOR = 101, 3, 4  # 12 samples in a batch of all ranks; the epoch's last one has 5
OPTIONS: dict[str, Any] = {
    "num_workers": 0, "shuffle": True, "drop_last": False, "pin_memory": False, "persistent_workers": False,
    "prefetch_factor": None, "timeout": 0, "multiprocessing_context": None, "collate_fn": None, "every_epochs": None,
}  # fmt: skip


class Own(Dataset[int]):
    random = False

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> int:
        return index


class InBatches:
    """Batches of 1 to 4 samples, in the dataset's order."""

    def sizes(self, epoch: int, random: Any) -> np.ndarray:
        return np.array([1 + number % 4 for number in range(40)])

    def at(self, epoch: int, numbers: np.ndarray, random: Any) -> list[np.ndarray]:
        ends = np.cumsum(self.sizes(epoch, random))
        return [np.arange(ends[number] - (1 + number % 4), ends[number]) for number in numbers]


def loader(rank: int, ranks: int, meant_for: int = MEANT_FOR, **more: Any) -> TrainLoader:
    return TrainLoader(Own(), 7, rank, ranks, BATCH, batch_ranks=meant_for, **{**OPTIONS, **more})


def steps_of(micros: list[MicroBatch]) -> list[list[MicroBatch]]:
    steps: list[list[MicroBatch]] = [[]]
    for micro in micros:
        steps[-1].append(micro)
        if micro.closes:
            steps.append([])
    assert steps.pop() == []
    return steps


def epoch_of(ranks: int, start: int = 0, **more: Any) -> list[tuple[list[int], int, list[float]]]:
    """Of each step its samples in the order of the epoch, where it ends, and the weight of each sample in its mean."""
    loaders = [loader(rank, ranks, **more) for rank in range(ranks)]
    by_rank = [steps_of([*each.epoch(1, start)]) for each in loaders]
    assert len({len(steps) for steps in by_rank}) == 1
    assert [each.steps(start) for each in loaders] == [len(by_rank[0])] * ranks
    found = []
    for step in zip(*by_rank, strict=True):
        assert len({len(micros) for micros in step}) == 1, "a rank would wait for the others"
        assert len(step[0]) <= loaders[0].accumulate
        samples: list[int] = []
        weights = []
        for together in zip(*step, strict=True):
            assert all(len(micro.batch) <= BATCH for micro in together) or "batch_sampler" in more
            rows = [micro.batch.tolist()[: micro.samples] for micro in together]
            in_turn = itertools.zip_longest(*rows) if "batch_sampler" not in more else rows
            samples += [index for row in in_turn for index in row if index is not None]
            for micro in together:
                weights += [micro.weight / ranks / max(1, micro.samples)] * micro.samples
                assert micro.weight == 0 or micro.samples
        assert len({micro.position for micros in step for micro in micros}) == 1
        found.append((samples, step[0][0].position, weights))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7, 13])
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="plain"),
        pytest.param({"accumulate": 3}, id="accumulate"),
        pytest.param({"drop_last": True, "accumulate": 2}, id="drop_last"),
        pytest.param({"steps_per_epoch": 5}, id="steps_per_epoch"),
    ],
)
def test_each_step_has_the_samples_that_it_has_on_the_ranks_that_it_is_meant_for(
    ranks: int, more: dict[str, Any]
) -> None:
    expected, found = epoch_of(MEANT_FOR, **more), epoch_of(ranks, **more)
    assert [(step[0], step[1]) for step in found] == [(step[0], step[1]) for step in expected]
    for samples, _, weights in found:
        assert weights == pytest.approx([1 / len(samples)] * len(samples))
    sizes = [len(samples) for samples, _, _ in found]
    accumulate = more.get("accumulate", 1)
    whole = BATCH * MEANT_FOR * accumulate
    if "steps_per_epoch" in more:
        assert sizes == [whole] * 5
    else:
        used = SIZE - SIZE % 12 if more.get("drop_last") else SIZE
        assert sizes == [whole] * (used // whole) + [used % whole] * bool(used % whole)
        order = [index for samples, _, _ in found for index in samples]
        assert len(set(order)) == len(order) == used


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 41])
def test_so_have_steps_of_a_batch_sampler(ranks: int) -> None:
    more: dict[str, Any] = {"batch_sampler": InBatches(), "accumulate": 2}
    expected, found = epoch_of(MEANT_FOR, **more), epoch_of(ranks, **more)
    assert [(step[0], step[1]) for step in found] == [(step[0], step[1]) for step in expected]
    assert [samples for step, _, _ in found for samples in step] == list(range(100))
    for samples, _, weights in found:
        assert weights == pytest.approx([1 / len(samples)] * len(samples))


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_from_the_middle_of_an_epoch_too(ranks: int) -> None:
    for _, position, _ in epoch_of(MEANT_FOR)[:-1]:
        rest = [step[:2] for step in epoch_of(ranks, start=position)]
        assert rest == [step[:2] for step in epoch_of(MEANT_FOR) if step[1] > position]


def test_batches_are_no_larger_than_they_are_meant_to_be_and_as_equal_as_that_allows() -> None:
    def sizes(ranks: int) -> list[int]:
        (first, *_) = steps_of([*loader(0, ranks).epoch(0)])
        return [micro.samples for micro in first]

    assert {ranks: sizes(ranks) for ranks in (1, 2, 3, 4, 5, 6)} == {
        1: [3, 3, 3, 3], 2: [3, 3], 3: [2, 2], 4: [3], 5: [3], 6: [2],
    }  # fmt: skip
    assert loader(0, 3).step_size == "12 = 2 x 3 rank(s) x 2 accumulated, as on the 4 that it began with"
    assert loader(0, 5).step_size == "12 = up to 3 x 5 rank(s), as on the 4 that it began with"
    assert loader(0, 4).step_size == "12 = 3 x 4 rank(s)"


def test_a_limit_counts_batches_of_the_ranks_that_it_is_meant_for() -> None:
    for limit, samples in ((3, 36), (0.5, 48)):
        for ranks in (1, 3, 4, 5):
            train = loader(0, ranks)
            train.shard.limit(limit)
            assert train.shard.end(0) == samples
            assert train.steps() == samples // 12
