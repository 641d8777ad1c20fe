"""The seeds of samples are those that rng.seed_sample gives, and only generators that are drawn from are seeded."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from dtrain.data import rng, sample_seeds
from dtrain.data.sample_seeds import Seeds, seeds_ahead, seeds_of
from dtrain.data.seeded_samples import SeededBatches


@pytest.fixture(autouse=True)
def _generators_of_before() -> Iterator[None]:
    with rng.untouched():
        yield


def by_numpy(*entropy: int) -> tuple[int, int, int]:
    """torch's, Python's and NumPy's seed."""
    words = [int(word) for word in np.random.SeedSequence(entropy).generate_state(4)]
    return words[2] * 2**32 + words[3], words[0], words[1]


def rows(seeds: Seeds) -> list[tuple[int, int, int]]:
    return [*zip(seeds.torch, seeds.python, seeds.numpy, strict=True)]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**70 + 3])
@pytest.mark.parametrize("epoch", [0, 5, 2**32 + 1])
def test_they_are_the_words_of_numpys_seed_sequence(seed: int, epoch: int) -> None:
    drawn = random.Random(seed + epoch)
    indices = [0, 1, 2**32 - 1, *(drawn.getrandbits(drawn.randrange(1, 33)) for _ in range(30))]
    places = drawn.sample(range(10**9), len(indices))
    assert rows(seeds_of(seed, epoch, indices)) == [by_numpy(seed, epoch, each) for each in indices]
    both = [by_numpy(seed, epoch, *each) for each in zip(indices, places, strict=True)]
    assert rows(seeds_of(seed, epoch, indices, places)) == both
    assert rows(seeds_of(seed, epoch, indices[:2], places[:2])) == both[:2], "of few samples"
    large = [*range(20), 2**33]
    assert rows(seeds_of(seed, epoch, large)) == [by_numpy(seed, epoch, index) for index in large]


def test_those_of_several_batches_are_told_apart() -> None:
    for shift in (0, 20):  # few samples, and more
        more = [[1, *range(100, 100 + shift)]] if shift else []
        plain = seeds_ahead(3, [[1, 5, 6], [1, 7], [1, 8, 9, 5], *more])
        assert [rows(each) for each in plain[:3]] == [
            [by_numpy(3, 1, index) for index in indices] for indices in ([5, 6], [7], [8, 9, 5])
        ]
        more = [[(1, *range(100, 100 + shift)), *range(shift)]] if shift else []
        placed = seeds_ahead(3, [[(1, 40, 41), 5, 6], [(1, 42), 5], *more])
        expected = [[by_numpy(3, 1, 5, 40), by_numpy(3, 1, 6, 41)], [by_numpy(3, 1, 5, 42)]]
        assert [rows(each) for each in placed[:2]] == expected


def test_what_follows_from_them_is_computed_once_for_all_batches() -> None:
    calls: list[str] = []

    def doubled(torchs: np.ndarray, name: str) -> list[int]:
        calls.append(name)
        return [2 * seed for seed in torchs.tolist()]

    batches = seeds_ahead(3, [[1, 5, 6], [1, 7]])
    for name in ("a", "b"):
        found = [value for batch in batches for value in batch.derived(doubled, name)]
        assert found == [2 * by_numpy(3, 1, index)[0] for index in (5, 6, 7)]
    assert calls == ["a", "b"]
    assert [batch.in_block for batch in batches] == [3, 3]


class LateDraws(Dataset[Any]):
    """Draws from torch always, from NumPy in every seventh sample, from Python in sample 30; `collate` draws, too."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> list[float]:
        of_numpy = np.random.randn() if index % 7 == 6 else 0.0
        return [float(torch.rand(())), of_numpy, random.gauss(0, 1) if index == 30 else 0.0]


def by_hand(index: int) -> list[float]:
    rng.seed_sample(11, 2, index)
    return LateDraws()[index]


def untouched() -> list[Any]:
    of_numpy: Any = np.random.get_state()
    return [random.getstate(), of_numpy[1].tolist(), of_numpy[2:], torch.get_rng_state().tolist()]


def test_a_generator_that_is_drawn_from_late_is_seeded_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [by_hand(index) for index in range(40)]
    calls = [0, 0, 0]

    def counting(place: int, seeder: Any) -> Any:
        def seed(value: int) -> None:
            calls[place] += 1
            seeder(value)

        return seed

    seeders = [counting(place, seeder) for place, seeder in enumerate(sample_seeds._SEEDERS)]
    monkeypatch.setattr(sample_seeds, "_SEEDERS", seeders)
    rng.seed_all(5)
    np.random.randn()  # one more waits
    torch.randn(())
    before = untouched()
    batches = SeededBatches(LateDraws(), 11, lambda items: items)
    made = [batches.counted([2, *range(low, low + 4)])[0] for low in range(0, 40, 4)]
    assert [item for batch in made for item in batch] == expected
    assert untouched() == before
    # The first batch seeds all; its second making NumPy's; Python's from the eighth on.
    assert calls[0] == 40 + 4 + 4
    assert calls[1] == 4 + 3 * 4
    assert calls[2] == 4 + 4 * 9 + 4


def test_what_the_collate_function_draws_follows_the_last_samples_numbers() -> None:
    def with_noise(items: list[Any]) -> list[Any]:
        return [*items, np.random.rand(), random.random()]

    rng.seed_sample(11, 2, 3)
    of_last = LateDraws()[3]
    expected = [of_last, np.random.rand(), random.random()]
    batches = SeededBatches(LateDraws(), 11, with_noise)
    for _ in range(2):
        assert batches.counted([2, 2, 3])[0][1:] == expected
