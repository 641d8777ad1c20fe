"""The order of an epoch and which of its samples a rank gets, as a function of seed, epoch and position."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

ORDER = 2  # the version of an epoch's order; 1 was that of checkpoints that hold no version
MOST_LISTED = 1 << 14  # up to so many samples their order is a shuffled list, which takes 0.2 ms to make


@dataclass
class ShuffledShard:
    """A batch sampler with DistributedSampler's semantics that can start anywhere and stores no permutation.

    Position p of epoch e holds sample permuted(p); rank r of W takes positions r, r + W, ... of each global batch. The
    last batch is short rather than padded; a rank that has no sample left in it takes one that does not count.
    """

    size: int
    seed: int
    rank: int
    world_size: int
    batch_size: int
    shuffle: bool = True
    drop_last: bool = False
    epoch: int = 0
    start: int = 0  # the position to begin at
    order: int = ORDER  # its version; a training of before ends its epoch in the order in which it began
    most: int | None = None  # samples of an epoch, where not all are used

    @property
    def global_batch(self) -> int:
        """Samples per batch, over all ranks."""
        return self.batch_size * self.world_size

    @property
    def place(self) -> tuple[int, ...]:
        """What tells this rank's batches from another's, and from those of another start."""
        return self.rank, self.epoch, self.start

    def set_epoch(self, epoch: int, start: int = 0, order: int = ORDER) -> None:
        """Choose the epoch whose order is used, the position to begin at, and the order's version."""
        self.epoch, self.start, self.order = epoch, start, order

    def end(self, start: int) -> int:
        """The position after the last sample that is used."""
        end = start + (self.size - start) // self.global_batch * self.global_batch if self.drop_last else self.size
        return end if self.most is None else max(start, min(end, self.most))

    def __len__(self) -> int:
        return -(-(self.end(self.start) - self.start) // self.global_batch)

    def batches_from(self, epoch: int, start: int, count: int) -> list[list[int]]:
        """The samples of this rank's next few batches, from a position of an epoch on."""
        shard = replace(self, epoch=epoch, start=start)
        return [indices for _, *indices in itertools.islice(shard, count)]

    def __iter__(self) -> Iterator[list[int]]:
        """Batches as [epoch, index, index, ...]: the epoch travels with the indices to the workers that live on."""
        epoch, end = self.epoch, self.end(self.start)
        block = self.global_batch * max(1, 8192 // self.batch_size)  # permuting in blocks costs a tenth
        for low in range(self.start, end, block):
            high = min(low + block, end)
            own = np.arange(low + self.rank, high, self.world_size)
            indices = self._indices(own).tolist()
            full = (high - low) // self.global_batch * self.batch_size
            for first in range(0, full, self.batch_size):
                yield [epoch, *indices[first : first + self.batch_size]]
            if (high - low) % self.global_batch:
                yield [epoch, *(indices[full:] or self._indices(np.array([high - 1])).tolist())]

    def _indices(self, positions: np.ndarray) -> np.ndarray:
        return permuted(positions, self.size, self.seed, self.epoch, self.order) if self.shuffle else positions


def permuted(positions: np.ndarray, size: int, seed: int, epoch: int, version: int = ORDER) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) sends the given positions.

    Of a small set, every order is equally likely. Of a larger one each position is computed on its own, and memory does
    not grow with `size`: a Feistel network permutes the next power of four; positions that land outside walk on until
    they are inside (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). A Feistel network gives even
    permutations only; a rotation before it, by a number that the keys decide, is as often odd as even.
    """
    if version > 1 and size <= MOST_LISTED:
        return _listed(size, seed, epoch)[positions]
    keys = np.random.SeedSequence((seed, epoch)).generate_state(7, np.uint64)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = positions.astype(np.uint64)
    if version > 1:
        result = (result + keys[6] % np.uint64(size)) % np.uint64(size)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys[:6]:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result.astype(np.int64)


@functools.lru_cache(4)  # one epoch's is asked for block by block
def _listed(size: int, seed: int, epoch: int) -> np.ndarray:
    """All of an epoch's order, by the one generator of NumPy whose numbers no version changes (NEP 19)."""
    bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    return np.random.RandomState(bits).permutation(size)


def _mixed(value: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class EvaluationShard:
    """A batch sampler that deals whole batches to the ranks: each sample once, in the batches that one process has."""

    def __init__(self, size: int, rank: int, world_size: int, batch_size: int) -> None:
        self.size, self.batch_size = size, batch_size
        self.place = rank, 0, 0, 1  # as a ShuffledShard's, and no training's
        self._starts = range(rank * batch_size, size, world_size * batch_size)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            yield [0, *range(start, min(start + self.batch_size, self.size))]
