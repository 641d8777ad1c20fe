"""The order of an epoch and which of its samples a rank gets, as a function of seed, epoch and position."""

import functools
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

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
    source: Any = None  # a sampler's order (see `orders`), by which a sample may come more than once in an epoch
    most: int | None = None  # samples of an epoch, where not all are used
    full_batch: int = 0  # samples in a batch of all ranks that the training is meant for; 0: these
    step_size: int = 0  # samples of an optimizer step, with which batches of all ranks begin anew; 0: one such batch

    def __post_init__(self) -> None:
        self.full_batch = self.full_batch or self.global_batch
        self.step_size = self.step_size or self.full_batch

    @property
    def samples(self) -> int:
        """Positions of the epoch."""
        return self.size if self.source is None else self.source.size(self.epoch)

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
        size = self.samples
        end = start + (size - start) // self.full_batch * self.full_batch if self.drop_last else size
        return end if self.most is None else max(start, min(end, self.most))

    def limit(self, limit: int | float) -> None:
        """Use so many first batches of all ranks, or a share of them."""
        self.most = limited(self.end(0), self.full_batch, limit)

    def edge(self, start: int, batches: int) -> int:
        """The position after so many batches of all ranks from a start on; the end where there are fewer."""
        return min(start + _covered(batches, self.global_batch, self.step_size), self.end(start))

    def edges_from(self, start: int) -> Iterator[int]:
        """The positions after one batch of all ranks, after two, and so on."""
        end, size = self.end(start), self.global_batch
        if self.step_size % size == 0:
            return map(min, itertools.count(start + size, size), itertools.repeat(end))
        return (min(start + high, end) for high in _covered_by_each(size, self.step_size))

    def own_samples(self, low: int, high: int) -> int:
        """How many samples of a batch of all ranks, from one position to another, are this rank's."""
        return max(0, -(-(high - low - self.rank) // self.world_size))

    def batches(self, start: int) -> int:
        """Batches of all ranks from a position to the end of the epoch."""
        return _batches(self.end(start) - start, self.global_batch, self.step_size)

    def steps(self, start: int) -> int:
        """Optimizer steps from a position to the end of the epoch."""
        return -(-(self.end(start) - start) // self.step_size)

    def steps_done(self, position: int) -> int:
        """Optimizer steps from the epoch's beginning to a position."""
        return -(-position // self.step_size)

    def smallest(self) -> int:
        """The position at which the epoch's smallest batch of all ranks begins: the last one, or the first."""
        last = self.edge(0, self.batches(0) - 1)
        return last if self.end(0) - last < self.edge(0, 1) else 0

    def __len__(self) -> int:
        return self.batches(self.start)

    def batches_from(self, epoch: int, start: int, count: int) -> list[list[int]]:
        """The samples of this rank's next few batches, from a position of an epoch on."""
        return [indices for _, *indices in self.requests_from(epoch, start, count)]

    def requests_from(self, epoch: int, start: int, count: int) -> list[list[Any]]:
        """The same as they are asked for, so that each sample has its random numbers."""
        return list(itertools.islice(replace(self, epoch=epoch, start=start), count))

    def __iter__(self) -> Iterator[list[Any]]:
        """Batches as [epoch, index, index, ...]: the epoch travels with the indices to the workers that live on.

        Where a sample may come again, each one's position travels, too: [(epoch, position, ...), index, ...].
        """
        epoch, end, size = self.epoch, self.end(self.start), self.batch_size
        # Where steps consist of whole batches, these need not begin anew with each.
        stretch = self.global_batch if self.step_size % self.global_batch == 0 else self.step_size
        block = stretch * max(1, 8192 * self.world_size // stretch)  # permuting in blocks costs a tenth
        for low in range(self.start, end, block):
            high = min(low + block, end)
            edges = [low, high] if stretch == self.global_batch else [*range(low, high, stretch), high]
            parts = [np.arange(first + self.rank, last, self.world_size) for first, last in itertools.pairwise(edges)]
            own = np.concatenate(parts)
            indices, places = self._indices(own).tolist(), own.tolist() if self.source else None
            first = 0
            for part, (begins, ends) in zip(parts, itertools.pairwise(edges), strict=True):
                after = first + len(part)
                for cut in range(first, after, size):
                    of_batch = slice(cut, min(cut + size, after))
                    yield [(epoch, *places[of_batch]) if places else epoch, *indices[of_batch]]
                if -(-(ends - begins) // self.global_batch) > -(-len(part) // size):  # the others have one more
                    spare = self._indices(np.array([ends - 1])).tolist()
                    yield [(epoch, ends - 1) if places is not None else epoch, *spare]
                first = after

    def sample_counts(self) -> set[int]:
        """How many samples the batches of a rank may have."""
        short = (
            {self.own_samples(0, self.step_size % self.global_batch)} if self.step_size % self.global_batch else set()
        )
        return _counts(self.samples, self.batch_size) | short

    def checksum(self) -> int:
        """Of the epoch's order."""
        return zlib.crc32(self._indices(np.arange(self.samples)).tobytes())

    def _indices(self, positions: np.ndarray) -> np.ndarray:
        if self.source is not None:
            return self.source.at(self.epoch, positions)
        return permuted(positions, self.size, self.seed, self.epoch, self.order) if self.shuffle else positions


@dataclass
class BatchShard:
    """Deals the batches of a batch sampler whole to the ranks: rank r of W has the batches r, r + W, ... of an epoch.

    The position counts samples, as everywhere; it lies between two batches. A rank that has no batch left in the last
    round takes a sample that does not count.
    """

    source: Any  # an order of batches, see `orders`
    rank: int
    world_size: int
    drop_last: bool = False  # leave out the last round where it does not give each rank a batch
    epoch: int = 0
    start: int = 0  # the position to begin at
    order: int = ORDER  # as a ShuffledShard has it; these orders have one version
    batch_size: int = 0  # as a ShuffledShard has it; here each batch has its own
    most: int | None = None  # rounds of an epoch, where not all are used
    full_batch: int = 0  # batches in a round of all ranks that the training is meant for; 0: one of each of these
    step_size: int = 0  # batches of an optimizer step, with which rounds begin anew; 0: one round
    _edges: tuple[int, np.ndarray] = (-1, np.zeros(1, np.int64))  # of an epoch: where each batch begins

    def __post_init__(self) -> None:
        self.full_batch = self.full_batch or self.world_size
        self.step_size = self.step_size or self.full_batch

    @property
    def place(self) -> tuple[int, ...]:
        """What tells this rank's batches from another's, and from those of another start."""
        return self.rank, self.epoch, self.start

    @property
    def samples(self) -> int:
        """Positions of the epoch."""
        return int(self.edges[-1])

    @property
    def edges(self) -> np.ndarray:
        """The positions at which the epoch's batches begin, and its end."""
        if self._edges[0] != self.epoch:
            self._edges = self.epoch, np.concatenate([[0], np.cumsum(self.source.sizes(self.epoch))])
        return self._edges[1]

    def set_epoch(self, epoch: int, start: int = 0, order: int = ORDER) -> None:
        """Choose the epoch whose order is used, and the position to begin at."""
        self.epoch, self.start, self.order = epoch, start, order

    def number(self, position: int) -> int:
        """Batches before a position."""
        return int(np.searchsorted(self.edges, position))

    def edge(self, start: int, batches: int) -> int:
        """The position after so many rounds from a start on; the end where there are fewer."""
        first, last = self.number(start), len(self.edges) - 1
        last -= (last - first) % self.full_batch if self.drop_last else 0
        last = last if self.most is None else min(last, self.most * self.full_batch)
        return int(self.edges[min(first + _covered(batches, self.world_size, self.step_size), last)])

    def end(self, start: int) -> int:
        """The position after the last sample that is used."""
        return self.edge(start, len(self.edges))

    def limit(self, limit: int | float) -> None:
        """Use so many first rounds, or a share of them."""
        self.most = limited(-(-self.number(self.end(0)) // self.full_batch), 1, limit)

    def edges_from(self, start: int) -> Iterator[int]:
        """The positions after one round, after two, and so on."""
        return (self.edge(start, rounds) for rounds in itertools.count(1))

    def own_samples(self, low: int, high: int) -> int:
        """How many samples of a round are this rank's: its batch, or none."""
        own = self.number(low) + self.rank
        return int(self.edges[own + 1] - self.edges[own]) if own < self.number(high) else 0

    def sample_counts(self) -> set[int]:
        """How many samples the batches of a rank may have."""
        return {1, *np.diff(self.edges).tolist()}

    def checksum(self) -> int:
        """Of the epoch's batches."""
        indices = self.source.at(self.epoch, np.arange(len(self.edges) - 1))
        return zlib.crc32(np.concatenate([self.edges, *indices]).tobytes())

    def batches(self, start: int) -> int:
        """Rounds from a position to the end of the epoch."""
        return _batches(self.number(self.end(start)) - self.number(start), self.world_size, self.step_size)

    def steps(self, start: int) -> int:
        """Optimizer steps from a position to the end of the epoch."""
        return -(-(self.number(self.end(start)) - self.number(start)) // self.step_size)

    def steps_done(self, position: int) -> int:
        """Optimizer steps from the epoch's beginning to a position."""
        return -(-self.number(position) // self.step_size)

    def smallest(self) -> int:
        """The position at which the epoch's smallest batch begins."""
        return int(self.edges[int(np.diff(self.edges[: self.number(self.end(0)) + 1]).argmin())])

    def __len__(self) -> int:
        return self.batches(self.start)

    def batches_from(self, epoch: int, start: int, count: int) -> list[list[int]]:
        """The samples of this rank's next few batches, from a position of an epoch on."""
        return [indices for _, *indices in self.requests_from(epoch, start, count)]

    def requests_from(self, epoch: int, start: int, count: int) -> list[list[Any]]:
        """The same as they are asked for, so that each sample has its random numbers."""
        return list(itertools.islice(replace(self, epoch=epoch, start=start), count))

    def __iter__(self) -> Iterator[list[Any]]:
        """Batches as [(epoch, position, position, ...), index, index, ...], as those of a ShuffledShard."""
        epoch, edges = self.epoch, self.edges
        first, end = self.number(self.start), self.number(self.end(self.start))
        covered = (min(first + each, end) for each in _covered_by_each(self.world_size, self.step_size))
        edges_of_rounds = itertools.pairwise(itertools.chain([first], covered))
        rounds = itertools.takewhile(lambda each: each[0] < each[1], edges_of_rounds)
        while block := list(itertools.islice(rounds, 64)):
            # A rank without a batch takes the first sample of the round's last one.
            own = np.array([min(low + self.rank, high - 1) for low, high in block])
            for number, (low, high), indices in zip(own.tolist(), block, self.source.at(epoch, own), strict=True):
                if low + self.rank < high:
                    yield [(epoch, *range(edges[number], edges[number + 1])), *np.asarray(indices).tolist()]
                else:
                    yield [(epoch, int(edges[number])), int(indices[0])]


def _covered(batches: int, per_batch: int, step_size: int) -> int:
    """What so many batches of all ranks cover, where each step begins a new one."""
    steps, more = divmod(batches, -(-step_size // per_batch))
    return steps * step_size + min(more * per_batch, step_size)


def _covered_by_each(per_batch: int, step_size: int) -> Iterator[int]:
    """The same of one batch, of two, and so on."""
    for low in itertools.count(0, step_size):
        yield from range(low + per_batch, low + step_size, per_batch)
        yield low + step_size


def _batches(size: int, per_batch: int, step_size: int) -> int:
    """How many batches of all ranks cover so much."""
    steps, rest = divmod(size, step_size)
    return steps * -(-step_size // per_batch) + -(-rest // per_batch)


def limited(size: int, batch_size: int, limit: int | float) -> int:
    """The samples in so many first batches, or in a share of them (0 to 1, at least one batch)."""
    batches = limit if isinstance(limit, int) else max(1, int(limit * -(-size // batch_size)))
    return min(size, batches * batch_size)


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
            left, right = right, left ^ (mixed(right ^ key) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result.astype(np.int64)


@functools.lru_cache(4)  # one epoch's is asked for block by block
def _listed(size: int, seed: int, epoch: int) -> np.ndarray:
    """All of an epoch's order, by the one generator of NumPy whose numbers no version changes (NEP 19)."""
    bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    return np.random.RandomState(bits).permutation(size)


def mixed(value: np.ndarray) -> np.ndarray:
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

    def sample_counts(self) -> set[int]:
        """How many samples a batch may have."""
        return _counts(self.size, self.batch_size)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            yield [0, *range(start, min(start + self.batch_size, self.size))]


def _counts(size: int, batch_size: int) -> set[int]:
    return {min(batch_size, size), size % batch_size}
