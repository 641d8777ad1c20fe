"""Generators that a dataset holds become what NumPy itself makes of their seeds, however that is done."""

import copy
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from dtrain.data import own_seeding
from dtrain.data.own_seeding import seeding_of
from dtrain.data.sample_seeds import FEW, Seeds
from dtrain.data.seeded_samples import SeededBatches

KINDS: list[Any] = [np.random.PCG64, np.random.PCG64DXSM]
SEEDS = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, *range(10**18, 10**18 + 20)]


def seeds_of(torchs: list[int]) -> Seeds:
    return Seeds(torchs, [], [])


def own(seed: int, name: str) -> int:
    return (seed + zlib.crc32(name.encode()) * 0x9E3779B97F4A7C15) % 2**64


def seen(generator: np.random.Generator) -> list[Any]:
    """All that a sample can see of a generator."""
    bits: Any = generator.bit_generator
    sequence = bits.seed_seq
    assert bits.lock is not None
    found = [bits.state, sequence.entropy, sequence.spawn_key, sequence.pool_size, sequence.n_children_spawned]
    found += [generator.integers(0, 99, 3, dtype=np.int32).tolist(), generator.normal(), generator.random(2).tolist()]
    found += [child.random() for child in generator.spawn(2)]
    return [*found, sequence.generate_state(8).tolist(), sequence.spawn(1)[0].spawn_key]


@pytest.fixture(params=[True, False], ids=["written", "made anew"])
def is_written(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(own_seeding, "_can_be_written", lambda kind: False)
        monkeypatch.setattr(own_seeding, "_can_be_set", lambda: False)
    return bool(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_for_each_sample_one_is_what_its_class_makes_of_the_seed(kind: Any, is_written: bool) -> None:
    generator = np.random.Generator(kind(5))
    generator.integers(9, dtype=np.int32)  # keeps the half of a number
    for held in (generator, generator.bit_generator):
        for seed, _ in zip(SEEDS, seeding_of(held, "there", seeds_of(SEEDS)), strict=True):
            assert seen(generator) == seen(np.random.Generator(kind(own(seed, "there"))))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_written_in_this_version_of_numpy(kind: Any) -> None:
    """Else these tests, and the figures of docs/performance.md, would be of something else."""
    assert own_seeding._can_be_written(kind) and own_seeding._can_be_set()
    assert len(SEEDS) >= FEW
    bits = kind(5)
    for _ in seeding_of(bits, "there", seeds_of(SEEDS)):
        break
    sequence = bits.seed_seq
    for _ in seeding_of(bits, "there", seeds_of(SEEDS)):
        assert bits.seed_seq is sequence, "which is not made for each sample"


def test_where_what_is_written_would_not_be_what_numpy_makes_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    check = own_seeding._can_be_written.__wrapped__
    assert check(np.random.PCG64)
    for other in (np.random.Philox, np.random.SFC64, np.random.MT19937):
        assert not check(other)
    monkeypatch.setattr(own_seeding, "_FACTOR", own_seeding._FACTOR + 2)
    assert not check(np.random.PCG64)


def test_neither_a_copy_nor_the_sequence_that_it_had_is_touched() -> None:
    """A copy of a dataset goes to each worker that is not forked."""
    held, sequence = np.random.default_rng(5), np.random.SeedSequence(6)
    held.bit_generator.__setstate__((held.bit_generator.state, sequence))  # type: ignore[attr-defined]
    for _ in seeding_of(held, "there", seeds_of(SEEDS)):
        break
    assert (sequence.entropy, sequence.n_children_spawned) == (6, 0)
    copied = copy.deepcopy(held)
    assert seen(copied) == seen(np.random.default_rng(own(SEEDS[0], "there")))
    copied, state = copy.deepcopy(held), held.bit_generator.state
    for _ in seeding_of(held, "there", seeds_of(SEEDS)):
        held.spawn(1)
    assert copied.bit_generator.state == state
    assert copied.bit_generator.seed_seq.entropy == own(SEEDS[0], "there")  # type: ignore[attr-defined]
    held.bit_generator.__setstate__((held.bit_generator.state, sequence))  # type: ignore[attr-defined]
    for seed, _ in zip(SEEDS, seeding_of(held, "there", seeds_of(SEEDS)), strict=True):
        assert held.spawn(1)[0].random() == np.random.default_rng(own(seed, "there")).spawn(1)[0].random()
    assert (sequence.entropy, sequence.n_children_spawned) == (6, 0)


def test_a_sequence_keeps_its_entropy_and_spawns_by_the_seed(is_written: bool) -> None:
    for made in (lambda: np.random.SeedSequence(7), lambda: np.random.SeedSequence(7, spawn_key=(3, 1), pool_size=8)):
        held, expected = made(), made()
        for seed, _ in zip(SEEDS, seeding_of(held, "there", seeds_of(SEEDS)), strict=True):
            number = own(seed, "there") % 2**31
            assert held.spawn(2)[1].spawn_key == (*expected.spawn_key, number + 1)
            assert held.state | {"n_children_spawned": 0} == expected.state
            assert held.generate_state(6).tolist() == expected.generate_state(6).tolist()


class Held(Dataset[Any]):
    """Draws from a generator that it holds."""

    def __init__(self, make: Callable[[], Any] = lambda: np.random.default_rng(5)) -> None:
        self.rng = make()

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, self.rng.random(), self.rng.integers(9, dtype=np.int32)], dtype=torch.float64)


@pytest.mark.parametrize("sizes", [[4, 1, 3], [4] * 8])
def test_batches_that_are_seeded_together_have_each_samples_own_numbers(sizes: list[int]) -> None:
    """Few samples and many, in an order of their own, whose generator the first of them replaces by another."""

    class Replaces(Held):
        def __getitem__(self, index: int) -> torch.Tensor:
            if isinstance(self.rng, np.random.RandomState):
                self.rng = np.random.default_rng(1)
            return super().__getitem__(index)

    indices = [7 * position % 64 for position in range(sum(sizes))]
    requests, low = [], 0
    for size in sizes:
        requests.append([2, *indices[low : low + size]])
        low += size
    expected = []
    for index in indices:
        words = [int(word) for word in np.random.SeedSequence((11, 2, index)).generate_state(4)]
        rng = np.random.default_rng(own(words[2] * 2**32 + words[3], "dataset.rng"))
        expected.append([index, rng.random(), rng.integers(9, dtype=np.int32)])
    for dataset in (Held(), Replaces(lambda: np.random.RandomState(3))):
        batches = SeededBatches(dataset, 11, None)
        assert torch.cat([batch for batch, _ in batches.in_turn(requests)]).tolist() == expected
