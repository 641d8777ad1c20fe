"""Orders other than the plain shuffle: what a sampler or batch sampler says, as a function of seed, epoch and position.

An order of samples has `size(epoch)` and `at(epoch, positions)`; an order of batches has `sizes(epoch)`, the samples of
each batch, and `at(epoch, numbers)`, the batches themselves. Nothing here knows of ranks: shards deal them out.
"""

import copy
import operator
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist
from torch import tensor
from torch.utils.data import DistributedSampler, WeightedRandomSampler

from dtrain.data import rng
from dtrain.data.own_generators import generators_in
from dtrain.data.own_seeding import seed_generator
from dtrain.data.samplers import mixed, permuted
from dtrain.distributed import by_node

_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, by which splitmix64 counts


class Order(Protocol):
    """Which sample each position of an epoch has."""

    def size(self, epoch: int) -> int:
        """Positions of an epoch."""

    def at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The samples at some of them."""


class BatchOrder(Protocol):
    """Which samples each batch of an epoch has."""

    def sizes(self, epoch: int) -> np.ndarray:
        """The samples of each batch of an epoch, in order."""

    def at(self, epoch: int, numbers: np.ndarray) -> list[np.ndarray]:
        """Some of the batches."""


class Random:
    """Random numbers that are computed, not drawn: each follows from the seed and some whole numbers that name it."""

    def __init__(self, seed: int) -> None:
        self._key = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]

    def uniform(self, positions: Any, *names: Any) -> np.ndarray:
        """Numbers from 0 to below 1, one for each position; names and positions may be arrays (they broadcast)."""
        return (self._bits(positions, *names) >> np.uint64(11)) * 2.0**-53

    def permuted(self, positions: Any, size: Any, *names: Any) -> np.ndarray:
        """Where the permutation of range(size) that the names name sends positions; all of it may be arrays.

        A Feistel network over the next power of four, as `samplers.permuted`, with keys of its own for each element.
        """
        result, size, key = np.broadcast_arrays(positions, size, self._bits(0, *names))
        shape, result, size, key = result.shape, result.ravel(), size.ravel().astype(np.uint64), key.ravel()
        bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1]
        half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
        result = (result.astype(np.uint64) + mixed(key) % size) % size
        rest = np.arange(len(result))
        while len(rest):  # what lands outside walks on until it is inside
            value, its_half, its_key = result[rest], half[rest], key[rest]
            mask = (np.uint64(1) << its_half) - np.uint64(1)
            left, right = value >> its_half, value & mask
            for number in range(6):
                round_key = mixed(its_key + np.uint64((number + 1) * _STEP % 2**64))
                left, right = right, left ^ (mixed(right ^ round_key) & mask)
            result[rest] = (left << its_half) | right
            rest = rest[result[rest] >= size[rest]]
        return result.astype(np.int64).reshape(shape)

    def _bits(self, positions: Any, *names: Any) -> np.ndarray:
        value = self._key
        with np.errstate(over="ignore"):
            for name in (*names, positions):
                value = mixed(value + np.asarray(name).astype(np.uint64) * np.uint64(_STEP) + np.uint64(_STEP))
        return np.asarray(value)


@dataclass
class Shuffled:
    """A new permutation of all samples in each epoch, or their own order."""

    samples: int
    seed: int
    shuffle: bool = True

    def size(self, epoch: int) -> int:
        """All of them."""
        return self.samples

    def at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """As a ShuffledShard without a sampler has them."""
        return permuted(positions, self.samples, self.seed, epoch) if self.shuffle else positions


class Computed:
    """What a sampler computes: `at(epoch, positions, random)`, and `__len__` samples, or `sizes(epoch, random)`."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self._random = sampler, Random(seed)

    def size(self, epoch: int) -> int:
        """Its length."""
        return len(self.sampler)

    def sizes(self, epoch: int) -> np.ndarray:
        """Of a batch sampler."""
        return self.sampler.sizes(epoch, self._random)

    def at(self, epoch: int, positions: np.ndarray) -> Any:
        """Samples, or of a batch sampler the batches."""
        return self.sampler.at(epoch, positions, self._random)


class Drawn:
    """What iterating a sampler gives, once for each epoch, with every generator seeded by (seed, epoch).

    The generators are those of Python, NumPy and torch, and those that the sampler holds; the program's own are left as
    they were. Each epoch iterates a copy, so that what the sampler counts in attributes does not last. Its epoch's
    indices are kept, eight bytes each.

    Raises:
        ValueError: It gives something else each time, also on other ranks, or no indices of the dataset.
    """

    def __init__(self, sampler: Any, seed: int, samples: int, in_batches: bool = False) -> None:
        self.sampler, self._seed, self._samples, self._in_batches = sampler, seed, samples, in_batches
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # indices, and where each batch begins
        if isinstance(sampler, DistributedSampler):
            raise ValueError("DistributedSampler is not needed: dtrain deals the samples to the ranks; remove it")
        if hasattr(sampler, "__next__") or not hasattr(sampler, "__iter__"):
            text = "cannot be iterated again for each epoch; write a class with __iter__"
            raise ValueError(f"a {type(sampler).__name__} {text}")
        if isinstance(sampler, WeightedRandomSampler) and len(sampler.weights) != samples:
            given = f"weights has {len(sampler.weights):,} values"
            raise ValueError(f"{given}; the dataset has {samples:,} samples, and each needs one")
        own = copy.copy(sampler)  # both times the same one: what it counts must not change what it gives
        first, again = self._iterated(0, own), self._iterated(0, own)
        if not all(map(np.array_equal, first, again)):
            raise ValueError(
                f"{self._name} gives another order each time that it is iterated; draw from Python's, NumPy's or "
                "torch's generators, which are seeded for each epoch, or let it follow from set_epoch(epoch)"
            )
        self._epochs[0] = first

    @property
    def _name(self) -> str:
        return type(self.sampler).__name__

    def size(self, epoch: int) -> int:
        """As many as it gave."""
        return len(self._drawn(epoch)[0])

    def sizes(self, epoch: int) -> np.ndarray:
        """The lengths of the lists that it gave."""
        return np.diff(self._drawn(epoch)[1])

    def at(self, epoch: int, positions: np.ndarray) -> Any:
        """Of what it gave."""
        indices, edges = self._drawn(epoch)
        if not self._in_batches:
            return indices[positions]
        return [indices[edges[number] : edges[number + 1]] for number in positions]

    def _drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            for old in list(self._epochs)[:-1]:  # an epoch may end in one pass and begin the next
                del self._epochs[old]
            try:
                self._epochs[epoch] = self._iterated(epoch, copy.copy(self.sampler))
            except ValueError as error:
                raise ValueError(f"{error} (in epoch {epoch + 1})") from error
        return self._epochs[epoch]

    def _iterated(self, epoch: int, sampler: Any) -> tuple[np.ndarray, np.ndarray]:
        with rng.untouched():
            seed = rng.seed_sample(self._seed, epoch, zlib.crc32(b"sampler"))
            generators, _ = generators_in(sampler=sampler)
            for name, generator in generators.items():
                seed_generator(generator, name, seed)
            for each in (sampler, getattr(sampler, "sampler", None), getattr(sampler, "batch_sampler", None)):
                if callable(announce := getattr(each, "set_epoch", None)):
                    announce(epoch)
            return self._in_batches_of(list(sampler)) if self._in_batches else self._checked(sampler)

    def _checked(self, indices: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
        try:
            found = np.fromiter(map(operator.index, indices), dtype=np.int64)
        except (TypeError, ValueError) as error:
            kind = "lists of indices" if self._in_batches else "indices, one at a time"
            raise ValueError(f"{self._name} must give {kind}: {error}") from error
        if found.size and not 0 <= found.min() <= found.max() < self._samples:
            wrong = int(found[(found < 0) | (found >= self._samples)][0])
            raise ValueError(f"{self._name} gave the index {wrong}; the dataset has {self._samples:,} samples, from 0")
        if not found.size:
            raise ValueError(f"{self._name} gave no indices")
        return found, np.array([0, len(found)])

    def _in_batches_of(self, lists: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        try:
            sizes = [len(each) for each in lists]
        except TypeError as error:
            raise ValueError(f"{self._name} must give lists of indices, one for each batch: {error}") from error
        if not all(sizes):
            raise ValueError(f"{self._name} gave a batch without any sample")
        indices, _ = self._checked(index for each in lists for index in each)
        return indices, np.concatenate([[0], np.cumsum(sizes)])


@dataclass
class Endless:
    """Epochs of a given length, of an order that is passed through again and again, each time as another epoch of it.

    The stream's place is epoch * length + position, in samples or, of an order of batches, in batches.
    """

    order: Any
    length: int
    of_batches: bool = False
    passes: int = field(init=False)  # the length of one

    def __post_init__(self) -> None:
        self.passes = self._length_of(0)

    def size(self, epoch: int) -> int:
        """The length."""
        return self.length

    def sizes(self, epoch: int) -> np.ndarray:
        """Those of the passes that the epoch has parts of."""
        places = epoch * self.length + np.arange(self.length)
        return np.concatenate([self.order.sizes(each)[inside] for each, inside in self._by_pass(places)])

    def at(self, epoch: int, positions: np.ndarray) -> Any:
        """Of the pass that each is in."""
        if self.of_batches:
            found: dict[int, Any] = {}
            for each, inside in self._by_pass(places := epoch * self.length + positions):
                own = places[places // self.passes == each].tolist()
                found |= dict(zip(own, self.order.at(each, inside), strict=True))
            return [found[place] for place in places.tolist()]
        places = epoch * self.length + positions
        result = np.empty(len(places), dtype=np.int64)
        for each, inside in self._by_pass(places):
            result[places // self.passes == each] = self.order.at(each, inside)
        return result

    def _by_pass(self, places: np.ndarray) -> list[tuple[int, np.ndarray]]:
        passes, inside = np.divmod(places, self.passes)
        result = [(int(each), inside[passes == each]) for each in np.unique(passes)]
        for each, _ in result:
            if self._length_of(each) != self.passes:
                raise ValueError(
                    f"the sampler gave {self._length_of(each)} in one pass and {self.passes} in the first; with "
                    "trainer.steps_per_epoch each pass must have the same length"
                )
        return result

    def _length_of(self, each: int) -> int:
        return len(self.order.sizes(each)) if self.of_batches else self.order.size(each)


def order_of(sampler: Any, seed: int, samples: int, in_batches: bool = False) -> Any:
    """The order that a sampler gives: computed where it has `at`, else by iterating it."""
    if hasattr(sampler, "at"):
        return Computed(sampler, seed)
    return Drawn(sampler, seed, samples, in_batches)


def require_same_on_ranks(shard: Any) -> None:
    """Refuse an order that this rank has and another has not, before an epoch; all ranks call it."""
    if shard.world_size == 1 or not dist.is_initialized():
        return
    own = shard.checksum()
    ends = tensor([own, -own])
    by_node.all_reduce(ends, dist.ReduceOp.MAX)
    if int(ends[0]) != -int(ends[1]):
        raise ValueError(
            "the sampler gives other indices on other ranks; its order must follow from the seed and the epoch alone"
        )
