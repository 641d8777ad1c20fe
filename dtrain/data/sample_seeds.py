"""Random numbers of its own for each sample: a batch's seeds at once, for those generators that are drawn from."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dtrain.data import rng

_MASK = 2**32 - 1


class Seeds(NamedTuple):
    """Of some samples, as `rng.seed_sample` has them."""

    torch: list[int]
    python: list[int]
    numpy: list[int]

    def part(self, low: int, high: int) -> "Seeds":
        """Those of some of the samples."""
        return Seeds(*(each[low:high] for each in self))


class SampleSeeds:
    """Seeds the CPU generators for each sample of a batch, as `rng.seed_sample` does, but those alone that it takes.

    Seeding all three takes 25 us a sample, and most datasets draw from one. So those that no sample has drawn from yet
    are left as they are, and looked at after the batch: if one turns out to be drawn from, the batch is made again.
    """

    def __init__(self) -> None:
        self.drawn: list[bool] | None = None  # torch's, Python's, NumPy's; not known before a first batch

    def made(self, seeds: Seeds, make: Callable[[Iterator[Any]], Any]) -> Any:
        """What `make` gives, which takes the next of what it is given before each sample: that seeds for it."""
        if self.drawn is None:
            return self._first(seeds, make)
        draws, drawn, has_monai = rng.draws(), self.drawn, rng.has_monai()
        while True:
            before = draws.marks()
            result = make(_seeding(seeds, drawn))
            late = [moved and not known for moved, known in zip(draws.moved(before), drawn, strict=True)]
            if not any(late) and has_monai == rng.has_monai():
                return result
            has_monai = rng.has_monai()
            drawn = self.drawn = [known or new for known, new in zip(drawn, late, strict=True)]

    def _first(self, seeds: Seeds, make: Callable[[Iterator[Any]], Any]) -> Any:
        """The same with all generators, which tells those that are drawn from."""
        draws, drawn, has_monai = rng.draws(), [False] * 3, rng.has_monai()
        seeded = draws.marks()

        def note() -> None:
            drawn[:] = [known or moved for known, moved in zip(drawn, draws.moved(seeded), strict=True)]

        def noting() -> Iterator[None]:
            nonlocal seeded
            for _ in _seeding(seeds, [True] * 3):
                seeded = draws.marks()
                yield
                note()

        result = make(noting())
        note()
        self.drawn = drawn
        return result if has_monai == rng.has_monai() else self.made(seeds, make)


# Not torch.manual_seed: it would reseed the accelerator's generator, too, which dropout draws from.
_SEEDERS: list[Callable[[int], Any]] = [torch.default_generator.manual_seed, random.seed, np.random.seed]


def _seeding(seeds: Seeds, wanted: Sequence[bool]) -> Iterator[Any]:
    """Seeds the wanted generators for one sample after the other, at each step; and MONAI's, where it is imported."""
    chosen = [map(seeder, own) for seeder, own, want in zip(_SEEDERS, seeds, wanted, strict=True) if want]
    if rng.has_monai():
        chosen.append(map(rng.set_seed_of_monai, (seed % 2**32 for seed in seeds.torch)))
    return zip(*chosen, strict=True) if chosen else itertools.repeat(None)


def seeds_of(seed: int, epoch: int, indices: Sequence[int], positions: Sequence[int] = ()) -> Seeds:
    """What `rng.seed_sample` seeds with for each of some samples, in a tenth of the time.

    The words of NumPy's SeedSequence, whose algorithm no version changes (NEP 19), are computed for all at once.
    """
    columns = [indices, positions] if positions else [indices]
    if max(map(max, columns)) > _MASK:
        rows = zip(*columns, strict=True)
        words = np.array([np.random.SeedSequence((seed, epoch, *row)).generate_state(4) for row in rows]).T
    else:
        shared = [*_words(seed), *_words(epoch)]
        entropy = np.empty((len(shared) + len(columns), len(indices)), np.uint32)
        entropy[: len(shared)] = np.array(shared, np.uint32)[:, None]
        entropy[len(shared) :] = columns
        words = _generated(_mixed(entropy))
    torchs = words[2].astype(np.uint64) << np.uint64(32) | words[3]
    return Seeds(torchs.tolist(), words[0].tolist(), words[1].tolist())


def seeds_ahead(seed: int, requests: Sequence[list[Any]]) -> list[Seeds]:
    """The same of several batches of an epoch: [epoch, index, ...] or [(epoch, position, ...), index, ...] each."""
    sizes = [len(request) - 1 for request in requests]
    epoch, *first = of_epoch if isinstance(of_epoch := requests[0][0], tuple) else (of_epoch,)
    indices = [index for request in requests for index in request[1:]]
    positions = [position for request in requests for position in request[0][1:]] if first else []
    seeds, ends = seeds_of(seed, epoch, indices, positions), [0, *itertools.accumulate(sizes)]
    return [seeds.part(low, high) for low, high in itertools.pairwise(ends)]


def _words(number: int) -> list[int]:
    """A non-negative integer in words of 32 bits, the lowest first."""
    words = [number & _MASK]
    while number := number >> 32:
        words.append(number & _MASK)
    return words


def _powers(first: int, factor: int, count: int) -> np.ndarray:
    """first, first * factor, ..., as a column."""
    return np.array([first * pow(factor, power, 2**32) & _MASK for power in range(count)], np.uint32)[:, None]


# SeedSequence's own numbers; what it mixes with goes through these, one step further for each word.
_POOL = 4
_A, _B = _powers(0x43B0D7E5, 0x931E8875, 64), _powers(0x8B51F9DD, 0x58F38DED, _POOL + 1)
_LEFT, _RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_HALF = np.uint32(16)
_OTHERS = [[place for place in range(_POOL) if place != source] for source in range(_POOL)]


def _hashed(value: np.ndarray, constants: np.ndarray) -> np.ndarray:
    value = (value ^ constants[:-1]) * constants[1:]
    return value ^ (value >> _HALF)


def _mixed(entropy: np.ndarray) -> np.ndarray:
    """SeedSequence.mix_entropy for each column of words; (4, samples)."""
    pool = np.zeros((_POOL, entropy.shape[1]), np.uint32)
    pool[: len(entropy)] = entropy[:_POOL]
    pool = _hashed(pool, _A[: _POOL + 1])
    used = _POOL
    for source, others in enumerate(_OTHERS):
        pool[others] = _both(pool[others], _hashed(pool[source], _A[used : used + _POOL]))
        used += _POOL - 1
    for more in entropy[_POOL:]:
        pool = _both(pool, _hashed(more, _A[used : used + _POOL + 1]))
        used += _POOL
    return pool


def _both(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    result: np.ndarray = one * _LEFT - other * _RIGHT
    return result ^ (result >> _HALF)


def _generated(pool: np.ndarray) -> np.ndarray:
    """SeedSequence.generate_state(4)."""
    return _hashed(pool, _B)
