"""Seeds the random number generators that a dataset holds, in place, for one sample after the other.

To make a `numpy.random.default_rng` anew, with all that it may spawn, takes 10 microseconds, as much as a small
augmentation. So what it is for each sample is computed for many of them at once, and written where it lies in memory.
"""

import ctypes
import functools
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dtrain.data.sample_seeds import FEW, Seeds
from dtrain.data.seed_sequences import generated, pools

_WRITTEN = (np.random.PCG64, np.random.PCG64DXSM)  # which differ in what they draw alone
_MOST_KEPT = 64  # generators whose places in memory are known


def seed_generator(generator: Any, name: str, seed: int) -> None:
    """Seed one of them, in place, from a seed of 64 bits; another name gives other numbers.

    A seed sequence keeps its entropy, and with it what is made of that; what it spawns next follows the seed.
    """
    next(seeding_of(generator, name, Seeds([seed], [], [])))


def seeding_of(generator: Any, name: str, seeds: Seeds) -> Iterator[Any]:
    """The same for one sample after the other, at each step."""
    bits = getattr(generator, "bit_generator", generator)
    kind: Any = type(bits)
    if kind in _WRITTEN and seeds.in_block >= FEW and _can_be_written(kind):
        return map(_memory_of(bits).write, seeds.derived(_pcg64_states, name))
    return map(_seeder(generator), seeds.derived(_short_seeds if _is_twister(generator) else _own_seeds, name))


def _own_seeds(torchs: np.ndarray, name: str) -> list[int]:
    own: list[int] = _own(torchs, name).tolist()
    return own


def _short_seeds(torchs: np.ndarray, name: str) -> list[int]:
    """Of 32 bits."""
    own: list[int] = (_own(torchs, name) % 2**32).tolist()
    return own


def _own(torchs: np.ndarray, name: str) -> np.ndarray:
    """The seeds of a generator of that name, of 64 bits, as torch's are, of which they are made."""
    return torchs + np.uint64(zlib.crc32(name.encode()) * 0x9E3779B97F4A7C15 % 2**64)


def _is_twister(generator: Any) -> bool:
    """Whether it is a RandomState of the usual kind, whose seeds have 32 bits."""
    return isinstance(generator, np.random.RandomState) and isinstance(generator._bit_generator, np.random.MT19937)


def _seeder(generator: Any) -> Callable[[int], Any]:
    if isinstance(generator, torch.Generator):
        return generator.manual_seed
    if isinstance(generator, random.Random) or _is_twister(generator):
        return generator.seed
    if isinstance(generator, np.random.Generator | np.random.BitGenerator):
        return functools.partial(_seed_bits, getattr(generator, "bit_generator", generator))
    if isinstance(generator, np.random.SeedSequence):
        is_usual = type(generator) is np.random.SeedSequence and _can_be_set()
        return functools.partial(_set_spawned if is_usual else _seed_sequence, generator)
    kind = type(generator._bit_generator)
    return lambda own: generator.set_state(np.random.RandomState(kind(own)).get_state(legacy=False))


def _seed_sequence(sequence: np.random.SeedSequence, own: int) -> None:
    spawned = own % 2**31  # half of what that counter holds: a sample may count on
    entropy, key, size = sequence.entropy, sequence.spawn_key, sequence.pool_size
    np.random.SeedSequence.__init__(sequence, entropy, spawn_key=key, pool_size=size, n_children_spawned=spawned)


def _set_spawned(sequence: np.random.SeedSequence, own: int) -> None:
    """The same without mixing the entropy once more: in a twentieth of the time."""
    _set(sequence, sequence.entropy, own % 2**31, sequence.pool, sequence.pool_size, sequence.spawn_key)


def _set(sequence: np.random.SeedSequence, *state: Any) -> None:
    """Entropy, children spawned, pool, its size and spawn key, as NumPy's own unpickling has them."""
    sequence.__setstate__(state)  # type: ignore[attr-defined]


@functools.cache
def _can_be_set() -> bool:
    """Whether this version's seed sequences are unpickled so."""
    sequence, pool = np.random.SeedSequence(1), np.random.SeedSequence(7, spawn_key=(5,)).pool
    try:
        _set(sequence, 7, 3, pool, 4, (5,))
    except Exception:  # another version's
        return False
    expected = np.random.SeedSequence(7, spawn_key=(5,), n_children_spawned=3)
    return bool(_all_of(sequence) == _all_of(expected))


def _all_of(sequence: np.random.SeedSequence) -> Any:
    """What can be seen of it; it spawns a child for that."""
    before = sequence.state, sequence.pool.tolist()
    words = [each.generate_state(8).tolist() for each in (sequence, sequence.spawn(1)[0])]
    return before, words, sequence.n_children_spawned


def _seed_bits(bits: Any, own: int) -> None:
    """As if it was made with this seed: `spawn` asks its seed sequence, which only unpickling replaces."""
    new = type(bits)(own)
    bits.__setstate__((new.state, new.seed_seq))


# ------------------------------------------------------------------------------------------------------ NumPy's PCG64

_State = tuple[int, np.ndarray, bytes]  # what it is seeded with, the pool of that seed sequence, and its own state
_FACTOR = 2549297995355413924 << 64 | 4865540595714422341  # of PCG64's step


class _Memory:
    """Where a PCG64 lies in memory, with a seed sequence of its own; nothing else is written at first.

    Raises:
        ValueError: It does not lie there as NumPy's source has it.
    """

    def __init__(self, bits: Any) -> None:
        head = bits.ctypes.state_address  # as NumPy documents it; there is the place of the state, then what is kept
        place = ctypes.c_void_p.from_address(head).value or 0
        if not id(bits) <= place <= id(bits) + type(bits).__basicsize__ - 32:
            raise ValueError
        self.bits, self.sequence = bits, np.random.SeedSequence(0)
        self.state = (ctypes.c_char * 32).from_address(place)
        self.kept = (ctypes.c_char * 8).from_address(head + 8)  # the half of a number that a draw of 32 bits leaves
        self.take_sequence()

    def take_sequence(self) -> None:
        """Have the generator spawn from this sequence, which only unpickling replaces."""
        self.bits.__setstate__((self.bits.state, self.sequence))

    def write(self, state: _State) -> None:
        """Let it be what its class makes of a seed."""
        own, pool, self.state.raw = state
        self.sequence.__setstate__((own, 0, pool, 4, ()))  # type: ignore[attr-defined]  # as in `_set`
        self.kept.raw = b"\0\0\0\0\0\0\0\0"


def _memory_of(bits: Any) -> _Memory:
    memory: _Memory = _kept_memory_of(bits)
    if bits.seed_seq is not memory.sequence:
        memory.take_sequence()
    return memory


_kept_memory_of = functools.lru_cache(_MOST_KEPT)(_Memory)


@functools.cache
def _can_be_written(kind: Any) -> bool:
    """Whether what is written is what this version of NumPy makes, in all that can be seen of it."""
    if sys.implementation.name != "cpython" or sys.byteorder != "little" or not _can_be_set():
        return False
    try:
        bits = kind(1)
        memory, seeds = _Memory(bits), [0, 7, 2**32, 2**64 - 1]
        for seed, state in zip(seeds, _pcg64_states(np.array(seeds, np.uint64), ""), strict=True):
            np.random.Generator(bits).integers(9, dtype=np.int32)  # keeps a half
            if memory.state.raw + memory.kept.raw != _expected(bits):
                return False
            memory.write(state)
            new = kind(seed)  # no name adds 0 to it
            if (bits.state, _all_of(bits.seed_seq)) != (new.state, _all_of(new.seed_seq)):
                return False
    except Exception:  # another version's
        return False
    return True


def _expected(bits: Any) -> bytes:
    """What should lie in memory."""
    state, order = bits.state, sys.byteorder
    wide = [state["state"][part].to_bytes(16, order) for part in ("state", "inc")]
    return b"".join([*wide, *(state[part].to_bytes(4, order) for part in ("has_uint32", "uinteger"))])


def _pcg64_states(torchs: np.ndarray, name: str) -> list[_State]:
    """Of one with each sample's own seed."""
    own = _own(torchs, name)
    pool = pools(_halves(own))
    words = generated(pool, 8)
    high, low, more, less = words[::2] | words[1::2].astype(np.uint64) << np.uint64(32)
    increment = more << np.uint64(1) | less >> np.uint64(63), less << np.uint64(1) | np.uint64(1)
    state = _sum(_product(_sum(increment, (high, low))), increment)
    whole = np.stack([state[1], state[0], increment[1], increment[0]], axis=1).view("V32")[:, 0]
    return [*zip(own.tolist(), pool.T.copy(), whole.tolist(), strict=True)]


_Wide = tuple[np.ndarray, np.ndarray]  # numbers of 128 bits: their high and low halves


def _halves(numbers: np.ndarray) -> np.ndarray:
    """Numbers of 64 bits as two rows of 32, the low one first."""
    return np.stack([numbers & np.uint64(2**32 - 1), numbers >> np.uint64(32)]).astype(np.uint32)


def _sum(one: _Wide, other: _Wide) -> _Wide:
    low = one[1] + other[1]
    return one[0] + other[0] + (low < one[1]), low


def _product(number: _Wide) -> _Wide:
    """Times PCG64's factor; the low halves by hand, as in school, in digits of 32 bits."""
    high, low = np.uint64(_FACTOR >> 64), np.uint64(_FACTOR & 2**64 - 1)
    mask, half = np.uint64(2**32 - 1), np.uint64(32)
    left, right = (number[1] >> half, number[1] & mask), (low >> half, low & mask)
    small = right[1] * left[1]
    middle = left[0] * right[1] + (small >> half)
    other = left[1] * right[0] + (middle & mask)
    carried = left[0] * right[0] + (middle >> half) + (other >> half)
    return carried + number[0] * low + number[1] * high, number[1] * low
