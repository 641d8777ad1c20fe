"""Random numbers of its own for each sample: a batch's seeds at once, for those generators that are drawn from."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dtrain.data import rng
from dtrain.data.seed_sequences import MASK, generated, pools, words_of

FEW = 8  # samples, whose seeds and generators NumPy makes sooner than its arrays do


class Seeds:
    """Of some samples, as `rng.seed_sample` has them; what else follows from them is computed for a whole block."""

    def __init__(self, torchs: list[int], pythons: list[int], numpys: list[int]) -> None:
        self.torch, self.python, self.numpy = torchs, pythons, numpys
        self._block, self._place = self, slice(None)
        self._derived: dict[Any, list[Any]] = {}

    @property
    def in_block(self) -> int:
        """The number of all samples of the block."""
        return len(self._block.torch)

    def part(self, low: int, high: int) -> "Seeds":
        """Those of some samples of the block."""
        part = Seeds(self.torch[low:high], self.python[low:high], self.numpy[low:high])
        part._block, part._place = self, slice(low, high)
        return part

    def derived(self, make: Callable[[np.ndarray, str], list[Any]], name: str) -> list[Any]:
        """What `make` gives for torch's seeds and a name, of which it makes something for each sample."""
        block = self._block
        if (make, name) not in block._derived:
            block._derived[make, name] = make(np.array(block.torch, np.uint64), name)
        return block._derived[make, name][self._place]


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
    own = (seeds.torch, seeds.python, seeds.numpy)
    chosen = [map(seeder, each) for seeder, each, want in zip(_SEEDERS, own, wanted, strict=True) if want]
    if rng.has_monai():
        chosen.append(map(rng.set_seed_of_monai, (seed % 2**32 for seed in seeds.torch)))
    return zip(*chosen, strict=True) if chosen else itertools.repeat(None)


def seeds_of(seed: int, epoch: int, indices: Sequence[int], positions: Sequence[int] = ()) -> Seeds:
    """What `rng.seed_sample` seeds with for each of some samples, in a tenth of the time."""
    columns = [indices, positions] if positions else [indices]
    if len(indices) < FEW or max(map(max, columns)) > MASK:
        rows = zip(*columns, strict=True)
        words = np.array([np.random.SeedSequence((seed, epoch, *row)).generate_state(4) for row in rows]).T
    else:
        shared = [*words_of(seed), *words_of(epoch)]
        entropy = np.empty((len(shared) + len(columns), len(indices)), np.uint32)
        entropy[: len(shared)] = np.array(shared, np.uint32)[:, None]
        entropy[len(shared) :] = columns
        words = generated(pools(entropy), 4)
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
